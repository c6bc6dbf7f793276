"""Share one run among several processes: collective operations, and Lightning's strategies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed as dist
from torch import nn

T = TypeVar("T")


def all_gather_dict(found: dict[int, T]) -> dict[int, T]:
    """Return the union of all processes' dictionaries, the same on each process. Collective."""
    if not _several():
        return found
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return {row: one for part in parts for row, one in part.items()}


def _several() -> bool:
    """Return whether a default process group is initialized."""
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class DistributedContext:
    """This process's place among the processes of a run.

    Args:
        rank: number of this process.
        size: number of processes.
        devices: number of processes on each machine.
        group: Gloo process group for Python objects, whatever the device; None for one process.
    """

    rank: int = 0
    size: int = 1
    devices: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which alone writes artifacts and results."""
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """Broadcast rank 0's `value` to all processes and return it. Collective."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, ordered by rank. Collective."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def trainer_options(self, strategy: str | None, precision: str) -> dict[str, Any]:
        """Return the arguments of a Lightning Trainer for these processes.

        Lightning never detects a cluster by itself: the environment is given in these arguments.

        Args:
            strategy: "ddp" or "fsdp"; not read for one process.
            precision: Lightning's name of the precision.
        """
        from lightning.fabric.plugins.environments import LightningEnvironment
        from lightning.pytorch.plugins import DoublePrecision
        from lightning.pytorch.strategies import DDPStrategy

        if self.size == 1:
            return {"precision": precision, "plugins": LightningEnvironment()}

        machine, place = divmod(self.rank, self.devices)

        class Here(LightningEnvironment):
            """Lightning environment whose processes have already been started."""

            creates_processes_externally = True

            def local_rank(self) -> int:
                return place

            def node_rank(self) -> int:
                return machine

        # flare_exp.data.sampling.RankShardBatchSampler divides the batches among the processes
        options = {
            "precision": precision,
            "num_nodes": self.size // self.devices,
            "use_distributed_sampler": False,
        }
        if strategy == "ddp":
            return {**options, "strategy": DDPStrategy(cluster_environment=Here())}
        sharded = _sharded_strategy(self.size)
        sharded.cluster_environment = Here()
        # 64-true works, but Lightning does not list it for this strategy
        if precision == "64-true":
            options |= {"precision": None, "plugins": DoublePrecision()}
        # the next training step cannot use weights that a validation gathers in inference mode
        return {**options, "strategy": sharded, "inference_mode": False}


SINGLE_PROCESS = DistributedContext()


def _sharded_strategy(size: int) -> Any:
    """Return Lightning's strategy for modules that shard themselves (`shard`).

    Its checkpoints have the same content as those of a single process.
    """
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    class Sharded(ModelParallelStrategy):
        def lightning_module_state_dict(self) -> dict[str, Any]:
            """Return the full trained weights on rank 0, without frozen weights to save memory."""
            options = StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
            )
            return get_model_state_dict(self.model, options=options)  # type: ignore[arg-type]

    return Sharded(
        data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def shard(module: nn.Module, units: Iterable[nn.Module], mesh: Any) -> None:
    """Leave each process of `mesh` a part of every weight (FSDP2).

    The weights of a unit are whole while the unit runs, and all others while `module` runs. No part
    of the module may be called from outside its forward pass.

    Args:
        module: the module to shard.
        units: parts of the module that are called, inner ones first.
        mesh: device mesh of the processes.
    """
    from torch.distributed.fsdp import fully_shard

    for unit in (*units, module):
        fully_shard(unit, mesh=mesh)
