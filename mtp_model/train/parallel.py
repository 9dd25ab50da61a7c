"""Several processes that train one adapter: each takes some of a batch's sequences, gradients are added.

Two ways. Data parallel: every process holds the whole model. Sharded (FSDP2, Zhao et al. 2023, arXiv 2304.11277): every process holds
a part of each layer's parameters, the base's too, and gathers a layer when it runs; embeddings, norms and sampler, which the
losses use outside the layers, stay whole. What a batch is, which anchors it has and what the loss is divided by do not depend on the number of
processes, so results differ by rounding alone.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_model.model import MTPModel


class World:
    """The processes of a run. `World()` is one process by itself; `World.start` joins those that torchrun started."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size, self.sharded = rank, size, False

    @classmethod
    def start(cls, device: str) -> tuple["World", str]:
        """The world that the environment describes (torchrun's RANK, WORLD_SIZE, LOCAL_RANK), and this process's device."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(), device
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), size), device

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def one_by_one(self, work):
        """`work()` in the first process, then in all others: it may leave something for them."""
        if self.rank == 0:
            result = work()
        if self.size > 1:
            dist.barrier()
        return result if self.rank == 0 else work()

    def part(self, count: int) -> slice:
        """Which of `count` sequences are this process's."""
        if count % self.size:
            raise ValueError(f"batch_size is {count} for {self.size} processes; accepted is a multiple of their number")
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The tensor added over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def shard(self, model: MTPModel, device: str) -> None:
        """Leave this process its part of each layer (FSDP2) and move what stays whole to `device`."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(device).type, (self.size,))
        for layer in model.layers:
            for parameter in layer.parameters():
                parameter.data = parameter.data.contiguous()
            fully_shard(layer, mesh=mesh)
        whole = {parameter for name, parameter in model.named_parameters() if not name.startswith("layers.")}
        fully_shard(model, mesh=mesh, ignored_params=whole)
        for layer in model.layers:  # gradients are added, as everywhere here, not averaged
            layer.set_gradient_divide_factor(1.0)
            layer.set_force_sum_reduction_for_comms(True)
        for tensor in (*whole, *model.buffers()):
            tensor.data = tensor.data.to(device)
        self.sharded = True
        model.use(model.implementation)

    def add_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add the processes' gradients; those of sharded parameters are added in the backward pass already."""
        if self.size == 1:
            return
        whole = [p for p in parameters if not _sharded(p)]
        for p in whole:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if whole:
            flat = self.all_sum(torch.cat([p.grad.flatten() for p in whole]))
            for p, gradient in zip(whole, flat.split([p.numel() for p in whole]), strict=True):
                p.grad.copy_(gradient.view_as(p))

    def clip_gradients(self, parameters: list[nn.Parameter], bound: float) -> float:
        """Scale the gradients so that their norm is at most `bound`; returns the norm before."""
        parts, whole = [], []
        for p in parameters:
            if p.grad is not None:
                (parts if _sharded(p.grad) else whole).append(p.grad.to_local() if _sharded(p.grad) else p.grad)

        def squares(gradients: list[Tensor]) -> Tensor:
            return torch.stack(torch._foreach_norm(gradients)).double().square().sum() if gradients else torch.zeros((), dtype=torch.float64)

        norm = (self.all_sum(squares(parts)) if parts else squares(parts)).cpu() + squares(whole).cpu()
        norm = float(norm.sqrt())
        if norm > bound:
            torch._foreach_mul_(parts + whole, bound / norm)
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be sharded, on the CPU. Every process must call it."""
        tensor = tensor.detach()
        return (tensor.full_tensor() if _sharded(tensor) else tensor).cpu().contiguous()

    def like(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """`whole` as `parameter` is held here: its device and its part."""
        whole = whole.to(parameter.device)
        if not _sharded(parameter):
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def _sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose import takes seconds."""
    return hasattr(tensor, "device_mesh")
