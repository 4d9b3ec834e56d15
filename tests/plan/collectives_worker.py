"""The joint update of a GPT-NeoX of two layers, compiled for a topology under fsdp: its figures.

WIDTH in the place of the tiny preset's 64: what the compiler for TPUs scatters depends on the size.
"""

import json
import sys

import jax

from jaxdyn.commands.plan import planned_run
from jaxdyn.commands.plan_options import PlanOptions
from jaxdyn.distributed import make_mesh
from jaxdyn.models import gpt_neox
from jaxdyn.plan.demand import demand_of
from jaxdyn.plan.figures import of_program
from jaxdyn.plan.programs import Setting
from jaxdyn.plan.topologies import open_topology
from jaxdyn.sections import MeshConfig

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_exec_time_optimization_effort", -1.0)  # the same collectives, sooner
topology, width = open_topology(sys.argv[1]), int(sys.argv[2])
mesh = make_mesh(MeshConfig(), topology.devices)
batch = {"num_prompts": 8, "num_generations": 2}
slots = {"max_prompt_length": 32, "max_completion_length": 32}
run = planned_run(PlanOptions("tiny", **batch, **slots))
model = gpt_neox(vocab_size=512, width=width, num_layers=2, num_heads=4)
demand = demand_of(Setting(model, run, mesh).update("joint"))
print(json.dumps(of_program(demand, topology.chip)))
