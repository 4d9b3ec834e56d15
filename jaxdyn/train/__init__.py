"""The training loop, its steps and jitted updates, and runs that were saved."""

from jaxdyn.train.analyze import analyze
from jaxdyn.train.export import export
from jaxdyn.train.export import run_to_model as run_reward
from jaxdyn.train.export import run_to_model as run_sft
from jaxdyn.train.loop import run as run_rl
from jaxdyn.train.policy import UpdateBatch
from jaxdyn.train.progress import Progress
from jaxdyn.train.saved import SavedRun, open_run
from jaxdyn.train.state import TrainState, fresh_state
from jaxdyn.train.update import update
