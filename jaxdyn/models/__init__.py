"""One decoder, configured into every family of `families`, as two pure functions."""

from jaxdyn.models import families
from jaxdyn.models.config import Gating, ModelConfig, RotaryScaling, SequenceHead
from jaxdyn.models.families import *  # noqa: F403, one constructor a family
from jaxdyn.models.gauge import regauge
from jaxdyn.models.heads import (
    add_sequence_head,
    init_value_head,
    read_by,
    sequence_scores,
    state_values,
    turn_in,
)
from jaxdyn.models.hf_config import config_from_hf, config_to_hf
from jaxdyn.models.huggingface import (
    load_pretrained,
    load_reward_model,
    local_directory,
    pretrained_config,
    save_pretrained,
)
from jaxdyn.models.lora import LoraConfig, add_adapters, has_adapters, merge_adapters
from jaxdyn.models.model import LanguageModel, positions_of
