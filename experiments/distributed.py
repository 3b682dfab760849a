"""Several processes on one machine as one trainer: replicas (DDP) or shards (FSDP2), started by torch.distributed.run.

Every rank draws the whole batch of a step, which is a function of (seed, step), and takes its own rows; losses and
gradients are means over ranks. So a run gives the numbers of a single process up to the order of float additions.
Dropout masks are the exception: each rank draws its own.
"""

import ctypes
import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

import xattn
from xattn import ConfigError
from xattn.experiments.data import Batch
from xattn.experiments.schema import TrainerConfig

# Ranks wait for each other while the first writes a checkpoint or compiles; a lost rank is noticed by its closed socket.
_PATIENCE = timedelta(hours=2)
_PR_SET_PDEATHSIG = 1
# A process group that is freed waits for its threads while it holds the interpreter's lock, which one of them may want:
# now and then a rank would hang instead of ending. So groups and what refers to them stay until the process is gone.
_KEPT: list[Any] = []


class Ranks:
    """This process's place among those of the run; a run of one process is rank 0 of 1 and communicates nothing."""

    def __init__(self, *, rank: int = 0, world: int = 1, strategy: str = "none") -> None:
        self.rank, self.world, self.strategy = rank, world, strategy

    @property
    def first(self) -> bool:
        """Whether this is the one rank that speaks and writes."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """This rank's rows of a step's batch."""
        rows = len(batch) // self.world
        return batch.rows(self.rank * rows, (self.rank + 1) * rows)

    def mean(self, value: float) -> float:
        """The mean over ranks."""
        return value if self.strategy == "none" else self._sum(value) / self.world

    def agree(self, ok: bool) -> bool:
        """Whether all ranks say so."""
        return ok if self.strategy == "none" else self._sum(float(ok)) == self.world

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def shard(self, model: Any) -> None:
        """Share out weights, block by block (fsdp); a replica (ddp) keeps its own."""
        if self.strategy != "fsdp":
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        kind = next(model.parameters()).device.type
        mesh = init_device_mesh(kind, (self.world,))
        _KEPT.extend((mesh, mesh.get_group()))
        for block in model.attn_layers.blocks:
            fully_shard(block, mesh=mesh)
        # The head's weights are used outside the model's own forward, so the outermost group stays gathered after it.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)

    def settle(self, *models: Any) -> None:
        """After a forward with no backward to follow: give back the weights that it left gathered (fsdp)."""
        if self.strategy == "fsdp":
            for model in models:
                model.reshard()

    def replicate(self, loss: nn.Module) -> nn.Module:
        """The loss module whose backward averages gradients over ranks (ddp); itself otherwise."""
        if self.strategy != "ddp":
            return loss
        from torch.nn.parallel import DistributedDataParallel

        replica = DistributedDataParallel(loss, gradient_as_bucket_view=True)
        _KEPT.append(replica)
        return replica

    def accumulating(self, model: Any, loss: nn.Module, *, last: bool) -> AbstractContextManager:
        """Around the forward and backward of one micro-batch: gradients travel with the last one only."""
        if self.strategy == "fsdp":
            model.set_requires_gradient_sync(last)
        return loss.no_sync() if self.strategy == "ddp" and not last else nullcontext()

    def whole(self, model: Any) -> Any:
        """The model in one piece, in evaluation mode; the first rank's to keep. All ranks call this together."""
        if self.strategy != "fsdp":
            return model
        weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
        whole = xattn.TransformerWrapper.from_spec(model.spec, attn_backend=model.attn_layers.attn_backend)
        whole.load_state_dict(weights)
        return whole.to(next(iter(weights.values())).device).eval()

    def leave(self) -> None:
        """Part from the others; nothing is shared from here on."""
        if self.strategy != "none" and dist.is_initialized():
            dist.destroy_process_group()
        self.world, self.strategy = 1, "none"


def join(trainer: TrainerConfig, device: torch.device) -> Ranks:
    """Meet the other ranks.

    Raises:
        ConfigError: the processes around are not those that the config asks for.
    """
    if trainer.strategy == "none":
        return Ranks()
    world = int(os.environ.get("WORLD_SIZE", "0"))
    if world != trainer.processes:
        raise ConfigError(
            f"trainer.processes={trainer.processes}, and {world or 'no'} ranks were started; use xattn-train, which starts them"
        )
    _die_with_parent()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    _KEPT.append(dist.group.WORLD)
    return Ranks(rank=dist.get_rank(), world=world, strategy=trainer.strategy)


def end_process(code: int) -> NoReturn:
    """End this rank at once, with nothing freed: see `_KEPT`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def local_rank() -> int:
    """This process's number on its machine; 0 where there is one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _die_with_parent() -> None:
    # Ranks outlive a launcher that was killed outright, and would go on writing into the run's directory.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
