"""DeepSpeed ZeRO behind a small surface: accumulate, step, read and restore state. The only door to deepspeed.

Weights, gradients and optimizer state are fp32 at every stage; bf16 enters as autocast around the encoder's
forward, so a step over many chunks adds up fp32 gradients and no loss scaling is needed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW's settings. lr is set for each step; the rest holds for the run."""

    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float


class Engine:
    """One model under ZeRO stage 0, 1, 2 or 3. All methods are collectives unless they say otherwise.

    With bf16 the model's forward runs under autocast from now on, wherever it is called from.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: OptimizerSettings,
        *,
        stage: int,
        local_batch: int,
        device: torch.device,
        bf16: bool = False,
    ) -> None:
        deepspeed = _import_deepspeed()
        if bf16:
            # Inside the model: on a GPU DeepSpeed turns off an autocast that it finds around its own forward, and its
            # own kind reduces gradients in bf16.
            module.forward = torch.autocast(device.type, dtype=torch.bfloat16)(module.forward)
        self.stage, self.device, self.max_grad_norm = stage, device, settings.max_grad_norm
        # Names and shapes are taken before ZeRO-3 partitions the parameters in place.
        self.shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self.count = sum(math.prod(shape) for shape in self.shapes.values())
        self.config = deepspeed_config(settings, stage=stage, local_batch=local_batch, parameters=self.count)
        self._deepspeed, *_ = deepspeed.initialize(
            model=module.to(device), optimizer=_adamw(module, settings), config=self.config, dist_init_required=False
        )
        self.parameters = dict(module.named_parameters())
        self.grad_norm = math.nan

    @property
    def module(self) -> nn.Module:
        """The model; call the engine itself to run it."""
        module: nn.Module = self._deepspeed.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model forward. A collective at stage 3 only: there all ranks must call it equally often."""
        return self._deepspeed(*args, **kwargs)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Hold gradients back over several `backward` calls; one reduction pass over ranks on leaving."""
        if self.stage > 0:
            with self._deepspeed.coalesce_grad_reduction():
                yield
            return
        with self._deepspeed.no_sync():
            yield
        if distributed.world() > 1:  # or DeepSpeed would copy all gradients into a buffer and back
            self._deepspeed.allreduce_gradients()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to what is accumulated. Local inside `accumulate`."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> bool:
        """Clip by the global norm and update at this learning rate; return whether the update was made.

        A non-finite gradient norm skips the update on every rank, since the norm is over all ranks' gradients.
        `grad_norm` then holds the norm before clipping (inf or nan when skipped).
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            return self._step_replicated()
        self._deepspeed.step()
        self.grad_norm = float(self._deepspeed.get_global_grad_norm())
        return bool(self._deepspeed.was_step_applied())

    def _step_replicated(self) -> bool:
        """Stage 0: every rank holds all averaged gradients, and DeepSpeed neither clips by our rule nor checks them."""
        trained = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        self.grad_norm = float(nn.utils.clip_grad_norm_(trained, self.max_grad_norm or math.inf))
        finite = math.isfinite(self.grad_norm)
        if finite:
            self._deepspeed.step()
        else:
            self._deepspeed.zero_grad()
        return finite

    # --- state ------------------------------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """The full fp32 weight of a parameter, on the host. A collective at stage 3 only."""
        parameter = self.parameters[name]
        if self.stage < 3:  # replicated, and equal to the fp32 master since training is fp32
            return parameter.detach().cpu().clone()
        with _import_deepspeed().zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()

    def moment(self, name: str, key: str) -> Tensor:
        """The full fp32 optimizer state `key` (one of MOMENTS) of a trained parameter, on the host, after a step."""
        whole = torch.zeros(math.prod(self.shapes[name]), device=self.device)
        fragment, start = self._fragment(name, key)
        whole[start : start + len(fragment)] = fragment
        if self.stage > 0:
            distributed.sum_in_place(whole)
        return whole.view(self.shapes[name]).cpu()

    def finite(self) -> bool:
        """Whether all weights and moments that this rank's optimizer holds are finite numbers. Local.

        A finite gradient can still push a weight, or the square in AdamW's second moment, out of fp32's range.
        """
        held = [tensor.detach() for flat in self._flat_parameters() for tensor in (flat, *self._moments_of(flat))]
        # NaN comes out of both ends; thirteen times faster on a CPU than isfinite of every element
        extremes = [torch.stack(tensor.aminmax()) for tensor in held if tensor.numel()]
        return not extremes or bool(torch.stack(extremes).isfinite().all())

    def trained(self) -> list[str]:
        """Names of the parameters that the optimizer updates. Local."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]

    def restore_optimizer(self, updates: int, moments: Any) -> None:
        """Set AdamW's state: `updates` made so far, and moments(name, key) -> the full tensor. Local.

        The state's fragments are written in place, wherever ZeRO has put them, so the state may come from another
        world size or another stage.
        """
        for flat in self._flat_parameters():
            state = self._optimizer.state[flat]
            state["step"] = torch.tensor(float(updates), device=flat.device if self.device.type == "cuda" else "cpu")
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat)
        for name in self.trained():
            for key in MOMENTS:
                fragment, start = self._fragment(name, key)
                fragment.copy_(moments(name, key).flatten()[start : start + len(fragment)])

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside ZeRO's wrapper."""
        wrapper = self._deepspeed.optimizer
        optimizer: torch.optim.Optimizer = wrapper if self.stage == 0 else wrapper.optimizer
        return optimizer

    def _flat_parameters(self) -> list[Tensor]:
        """What AdamW itself updates: the parameters at stage 0, this rank's flat partitions above."""
        if self.stage == 0:
            return [self.parameters[name] for name in self.trained()]
        zero = self._deepspeed.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _moments_of(self, flat: Tensor) -> list[Tensor]:
        """AdamW's state of one of the flat parameters; none before the first update."""
        state = self._optimizer.state.get(flat, {})
        return [state[key] for key in MOMENTS if key in state]

    def _fragment(self, name: str, key: str) -> tuple[Tensor, int]:
        """This rank's part of a parameter's optimizer state, as a view to read or write, and where the part starts."""
        parameter: Any = self.parameters[name]
        if self.stage == 0:
            return self._optimizer.state[parameter][key].view(-1), 0
        if self.stage == 3:
            partition, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, False, key)
            start = len(partition) * distributed.rank()
            size = math.prod(self.shapes[name])
            return partition[: max(0, size - start)], min(start, size)  # the last partitions may be padding
        mapping = parameter._hp_mapping
        if mapping is None:  # another rank's
            return torch.empty(0, device=self.device), 0
        here, inside = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        flat = self._flat_parameters()[mapping.param_group_index]
        return self._optimizer.state[flat][key].narrow(0, here.start, here.numel), inside.start


def deepspeed_config(settings: OptimizerSettings, *, stage: int, local_batch: int, parameters: int) -> dict[str, Any]:
    """The ds_config.json of a run. Everything DeepSpeed would choose by itself and that matters is set here."""
    bucket = min(50_000_000, max(1_000_000, parameters))
    return {
        "train_micro_batch_size_per_gpu": local_batch,
        "train_batch_size": local_batch * distributed.world(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm if stage > 0 else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _adamw(module: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW without decay on biases and norms (as BERT was trained: Devlin et al. 2019, and the Trainer's default)."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    decayed = [parameter for parameter in trained.values() if parameter.ndim > 1]
    plain = [parameter for parameter in trained.values() if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Leave functions as they are, inside: DeepSpeed hands those of an optimizer that is not used here to torch.compile
    as it is imported, for which torch brings in all of Inductor. That is a fifth of the time to start.
    """
    compile_it = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_it


def _import_deepspeed() -> Any:
    """Import DeepSpeed quietly, and without the one op that it would compile on a CPU.

    That op shares memory between the ranks of one host. Its build needs a compiler, fails on a path with a blank and
    hangs on a stale lock, and its buffers outlive the job; gloo does the same sums.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*")
    with _nothing_compiled():
        import deepspeed

        with contextlib.suppress(ImportError):
            import deepspeed.runtime.zero.muon.original_muon

    deepspeed.ops.__compatible_ops__ = {}  # asked for it, DeepSpeed tries what would compile, with gcc's complaints
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
