"""Share one run among several processes: who leads, and what they tell one another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed as dist
from torch import nn

T = TypeVar("T")


def gathered(found: dict[int, T]) -> dict[int, T]:
    """The union of all processes' dictionaries, the same on each."""
    if not _several():
        return found
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return {row: one for part in parts for row, one in part.items()}


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class Team:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1
    devices: int = 1  # of each machine
    group: Any = None  # of gloo, whatever the device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agree(self, value: Any = None) -> Any:
        """The leader's `value`; every process must come here."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank; every process must come here."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def trainer_options(self, strategy: str | None, precision: str) -> dict[str, Any]:
        """Arguments of a Lightning Trainer for this team; it never looks for a cluster by itself. strategy: ddp or fsdp."""
        from lightning.fabric.plugins.environments import LightningEnvironment
        from lightning.pytorch.plugins import DoublePrecision
        from lightning.pytorch.strategies import DDPStrategy

        if self.size == 1:
            return {"precision": precision, "plugins": LightningEnvironment()}

        machine, place = divmod(self.rank, self.devices)

        class Here(LightningEnvironment):
            """The processes are there already."""

            creates_processes_externally = True

            def local_rank(self) -> int:
                return place

            def node_rank(self) -> int:
                return machine

        # flare_exp.data.sampling.Shares shares the batches out
        options = {
            "precision": precision,
            "num_nodes": self.size // self.devices,
            "use_distributed_sampler": False,
        }
        if strategy == "ddp":
            return {**options, "strategy": DDPStrategy(cluster_environment=Here())}
        sharded = _sharded_strategy(self.size)
        sharded.cluster_environment = Here()
        if precision == "64-true":  # which works, but is not on Lightning's list for this strategy
            options |= {"precision": None, "plugins": DoublePrecision()}
        # weights that were gathered in inference_mode would be of no use to the training that follows a validation
        return {**options, "strategy": sharded, "inference_mode": False}


ALONE = Team()


def _sharded_strategy(size: int) -> Any:
    """Lightning's strategy for modules that shard themselves (`shard`); its checkpoints are those of one process."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    class Sharded(ModelParallelStrategy):
        def lightning_module_state_dict(self) -> dict[str, Any]:
            """The trained weights, whole, on the leader; of the others nobody has room for."""
            options = StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
            )
            return get_model_state_dict(self.model, options=options)  # type: ignore[arg-type]

    return Sharded(
        data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def shard(module: nn.Module, units: Iterable[nn.Module], mesh: Any) -> None:
    """Leave each process of `mesh` a part of every weight (FSDP2). A unit's whole weights are there while it runs; all others
    while `module` does, so that nothing may be called from outside its forward.

    Args:
        units: parts of the module that are called, inner ones first.
    """
    from torch.distributed.fsdp import fully_shard

    for unit in (*units, module):
        fully_shard(unit, mesh=mesh)
