"""Meshes of devices, and where arrays lie on them."""

from jaxdyn.distributed.layout import Layout, one_device
from jaxdyn.distributed.mesh import make_mesh, require_divisible
from jaxdyn.distributed.rules import shardings
from jaxdyn.distributed.sharded import ShardedModel, shard_model
