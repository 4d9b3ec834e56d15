"""A pass of two layers for four v6e, compiled with the compiler's tiles and with small ones."""

import json

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
topology = open_topology("v6e-4")
run = planned_run(PlanOptions("tiny", num_prompts=4, max_prompt_length=512))
model = gpt_neox(vocab_size=512, width=512, num_layers=2, num_heads=4)
program = Setting(model, run, make_mesh(MeshConfig(), topology.devices)).prefill()
found = {}
for name, options in (("whole", None), ("small", topology.options)):
    found[name] = of_program(demand_of(program, options=options), topology.chip)
print(json.dumps(found))
