"""Training an adapter for a frozen base model. Interrupt it at any moment and resume to the same result, bit for bit.

What a step does depends only on the settings and its number, and everything that a step changes (adapter, AdamW's
moments) is in the checkpoint. On a CPU in float32, with the same number of threads, a resumed run is the uninterrupted
one; on a GPU the result is as reproducible as PyTorch's kernels. Several processes share each batch (`parallel`); another number of
them changes rounding and nothing else, so a run may be resumed by any.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mtp_model.batches import Batches
from mtp_model.checkpoint import ADAPTER_CONFIG, Adapter, save_adapter, write_tensors
from mtp_model.config import MTPConfig
from mtp_model.data import Batch, Example, Examples, collate, has_anchor
from mtp_model.loss import choose_anchors, mtp_loss, report
from mtp_model.model import MTPModel
from mtp_model.train.config import TrainConfig
from mtp_model.train.parallel import World
from mtp_model.train.watch import LOG, Evaluation, Watch, peak_memory_mib, trim_log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINT = "checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingFailed(RuntimeError):
    """The run cannot go on; its last checkpoint is whole."""


def check_out(out: Path, resume: bool) -> None:
    """Raises ValueError unless `out` is a place for a new run, or holds one to go on with."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{out} cannot be made or written to ({place}); accepted is a directory, or the name of a new one")
    checkpoint, adapter, log = (out / name for name in (CHECKPOINT, ADAPTER_CONFIG, LOG))
    if not resume and (checkpoint.exists() or adapter.exists() or log.exists() and log.stat().st_size):
        raise ValueError(f"{out} holds a run already; resume it, or choose another directory")
    if resume and adapter.exists() and not checkpoint.exists():
        raise ValueError(f"{out} holds an adapter and no {CHECKPOINT} to go on from; choose another directory")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Raises ValueError while another process trains in `out`, where the system can tell."""
    directory = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if directory is not None:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{out} holds a run that another process is at; accepted is one that has ended, or another directory") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if directory is not None:
            os.close(directory)


class Trainer:
    """A training run in the directory `out`: adapter, checkpoint and log. `run()` trains to the end or to an interruption.

    model: with or without an adapter; another is put on, a fresh one of `mtp`, or, where `mtp` is an `Adapter`, that one, to be trained further
    (with AdamW's moments from zero). resume: continue the run that `out` holds. evaluation: held-out decoding on the way. world: the processes
    that share the work, `shard` leaves each a part of the model, on `device`.
    Raises ValueError if `out` holds a run and `resume` is False, or one with other settings, for an adapter of another base, and for an example
    without a place for masks.
    """

    def __init__(
        self,
        model: MTPModel,
        examples: Examples | Sequence[Example],
        mtp: MTPConfig | Adapter,
        config: TrainConfig,
        out: str | Path,
        *,
        resume: bool = False,
        notes: dict | None = None,
        evaluation: Evaluation | None = None,
        world: World | None = None,
        shard: str | None = None,
    ):
        self.model, self.config, self.out, self.world = model, config, Path(out), world or World()
        if self.world.rank == 0:
            check_out(self.out, resume)
        if not isinstance(examples, Examples):
            placeless = [i for i, example in enumerate(examples) if not has_anchor(example.answer)]
            if placeless:
                raise ValueError(f"examples {placeless[:8]} have no place for masks; accepted are answers of two tokens or more")
            examples = Examples.of(examples)
        self.examples = examples
        start, mtp = (mtp, mtp.config) if isinstance(mtp, Adapter) else (None, mtp)
        self.notes, self.evaluation = (notes or {}) | ({"before": start.notes} if start else {}), evaluation
        self.part = self.world.part(config.batch_size)
        self.batches = Batches(
            self.examples.lengths, config.batch_size, config.seed, pack_length=config.pack_length, buckets=config.buckets
        )  # fmt: skip
        # What decides the result; a run resumed under other settings would be neither run.
        free = {"save_every", "log_every", "recompute"}
        self.identity = {k: v for k, v in asdict(config).items() if k not in free} | {
            "mtp": asdict(mtp) | {"target_modules": list(mtp.target_modules)}, "base": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."), "examples": len(self.examples), "data": self.examples.fingerprint,
            "start": None if start is None else start.fingerprint,
        }  # fmt: skip
        checkpoint = self.out / CHECKPOINT
        state = self._read_state(checkpoint) if checkpoint.exists() else {"step": 0, "seconds": 0.0, "mask_rows": 0}
        self.step, self.seconds, self.mask_rows = state["step"], state["seconds"], state["mask_rows"]
        self.unevaluated = state.get("unevaluated", False)  # an evaluation at this step was interrupted

        if model.mtp is not None:
            model.remove_adapter()
        if start is None:
            model.add_adapter(mtp, seed=config.seed, dtype=torch.float32, train_masks=config.train_masks)
        else:
            start.apply(model, dtype=torch.float32).masks.requires_grad_(config.train_masks)
        model.recompute_activations(config.recompute)
        if shard is not None:
            self.world.shard(model, shard)
        self.parameters = {n: p for n, p in model.adapter_parameters().items() if p.requires_grad}
        inside = [p for n, p in self.parameters.items() if n.startswith("layers.")]
        outside = [p for n, p in self.parameters.items() if not n.startswith("layers.")]
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in (inside, outside) if group], lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )  # fmt: skip
        if checkpoint.exists():
            self._load(checkpoint)
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)

    def _read_state(self, path: Path) -> dict:
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
            before = state["identity"]
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no checkpoint that can be read: {error}") from None
        changed = [f"{k}: {before.get(k)!r}, now {v!r}" for k, v in self.identity.items() if before.get(k) != v]
        if changed:
            raise ValueError(f"{path} is of a run with other settings ({'; '.join(changed)}); accepted are the same ones, "
                             "or another directory for a run from its adapter on (--adapter)")  # fmt: skip
        return state

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for name, parameter in self.parameters.items():
                parameter.copy_(self.world.like(file.get_tensor(f"parameter/{name}"), parameter))
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step))} | {
                    moment: self.world.like(file.get_tensor(f"{moment}/{name}"), parameter) for moment in MOMENTS
                }

    @property
    def _kept(self) -> str:
        """What an error says of the run so far."""
        if (self.out / CHECKPOINT).exists():
            return f"--resume continues from the last checkpoint in {self.out}"
        return f"there is no checkpoint in {self.out} yet"

    def save(self) -> None:
        """Write the checkpoint, then the adapter as it stands. Each file is replaced whole."""
        tensors = {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter) or {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            tensors[f"parameter/{name}"] = self.world.whole(parameter)
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self.world.whole(moments[moment])
        if self.world.rank:
            return
        state = {"step": self.step, "seconds": self.seconds, "mask_rows": self.mask_rows, "unevaluated": self.unevaluated, "identity": self.identity}
        write_tensors(self.out / CHECKPOINT, tensors, {"state": json.dumps(state)})
        training = asdict(self.config) | {"steps_done": self.step, "mask_rows": self.mask_rows}
        trained = {name: tensors[f"parameter/{name}"] for name in self.parameters}
        if not self.config.train_masks:
            trained["masks"] = self.model.masks
        save_adapter(self.model, self.out, self.notes | {"training": training}, trained)

    def _pass(self, number: int) -> tuple[Batch, dict]:
        """This process's part of batch `number`, and how `mtp_loss` is to take it; both follow from the settings alone."""
        config = self.config
        batch = collate([[self.examples[i] for i in sequence] for sequence in self.batches(number)])
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        anchors, real = choose_anchors(batch, config.anchors_per_sequence, generator)
        k = self.model.mtp.num_masks
        if config.drop_masks and k > 1 and float(torch.rand((), generator=generator)) < config.drop_masks:
            k = int(torch.randint(1, k, (), generator=generator))
        device, part = self.model.device, self.part
        first = None if batch.first is None else batch.first[:, part].to(device)
        mine = replace(batch, ids=batch.ids[:, part].to(device), answer=batch.answer[:, part].to(device), first=first, lengths=batch.lengths[part])
        return mine, {"anchors": (anchors[:, part].to(device), real[:, part].to(device)), "masks": k}

    def train_step(self) -> dict:
        """One optimizer step; returns the log record."""
        config, world, parameters = self.config, self.world, list(self.parameters.values())
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        reports, tokens = [], 0
        for micro in range(config.accumulate):
            batch, options = self._pass(self.step * config.accumulate + micro)
            losses = mtp_loss(
                self.model, batch, **options, lcm_weight=config.lcm_weight, mask_decay=config.mask_decay, soft_targets=config.soft_targets,
                all_sum=world.all_sum,
            )  # fmt: skip
            (losses.total / config.accumulate).backward()
            sums = world.all_sum(torch.cat([losses.sums, batch.lengths.sum().double().view(1)]))
            reports.append(report(sums[:-1], self.model.sampler is not None))
            tokens += int(sums[-1])
        world.add_gradients(parameters)
        norm = world.clip_gradients(parameters, config.clip)

        def mean(values):  # of a mask's guesses those passes tell that had the mask
            known = [value for value in values if not math.isnan(value)]
            return sum(known) / len(known) if known else math.nan

        loss = sum(r.loss for r in reports) / len(reports)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingFailed(
                f"the loss is {loss} and the gradient norm {norm} at step {self.step + 1}; {self._kept}, and on the same machine comes to the same: "
                f"a lower lr or a longer warmup are for another run"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.mask_rows += sum(r.rows for r in reports)
        record = {"step": self.step, "loss": loss}
        record |= {name: mean([getattr(r, name) for r in reports]) for name in ("ntp", "base", "sampler", "lcm")}
        for name in ("right_base", "right_sampler"):
            record[name] = [round(mean(column), 4) for column in zip(*(getattr(r, name) for r in reports), strict=True)]
        return record | {
            "lr": config.lr_at(self.step - 1), "grad_norm": norm, "mask_rows": self.mask_rows, "seconds": round(self.seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1), "memory_mib": round(peak_memory_mib(self.model.device), 1),
        }  # fmt: skip

    def run(self) -> bool:
        """Train; returns whether the end was reached. Ctrl-C, SIGTERM or a closed terminal ends it after the step under way, saved; an evaluation
        under way is made anew by the resumed run.

        Raises TrainingFailed if the loss is no number, or another process of the run is lost, and ValueError while another trains in the directory.
        """
        if self.world.rank:
            return self._guarded()
        with _alone(self.out):
            checkpoint = self.out / CHECKPOINT
            if checkpoint.exists() and self._read_state(checkpoint)["step"] > self.step:
                raise ValueError(f"{self.out} was trained beyond step {self.step} by another process meanwhile; resume it again")
            trim_log(self.out / LOG, self.step)
            return self._guarded()

    def _guarded(self) -> bool:
        stop: list[int] = []
        handlers = {}
        for number in (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_IGN and number != signal.SIGINT:  # as under nohup
                continue
            try:
                handlers[number] = signal.signal(number, lambda n, _: stop.append(n))
            except ValueError:  # not in the main thread: the caller keeps the signals
                break
        try:
            with Watch(self.out, self.config.steps, self.step, self.world) as watch:
                self._run(watch, stop)
        except TrainingFailed:
            raise
        except OSError as error:
            raise TrainingFailed(f"the run cannot go on after step {self.step}: {error}; {self._kept}") from error
        except RuntimeError as error:
            if self.world.size == 1:
                raise
            raise TrainingFailed(
                f"process {self.world.rank} of {self.world.size} cannot go on after step {self.step}, likely because another has ended ({error}); "
                f"{self._kept}"
            ) from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.step >= self.config.steps and not self.unevaluated

    def _run(self, watch: Watch, stop: list[int]) -> None:
        config = self.config
        if self.unevaluated:
            self._evaluate(watch, stop)
        while self.step < config.steps and not self._stopping(stop) and not self.unevaluated:
            record = self.train_step()
            last = self.step == config.steps
            watch.step(record, write=last or self.step % config.log_every == 0)
            if self.evaluation is not None and (last or self.step % self.evaluation.every == 0):
                self._evaluate(watch, stop)
            if self.step % config.save_every == 0 and not last:
                self.save()
        self.save()

    def _evaluate(self, watch: Watch, stop: list[int]) -> None:
        values = None if self.evaluation is None else self.evaluation.run(self.model, self.world, lambda: stop)
        self.unevaluated = values is None and self.evaluation is not None
        if values is not None:
            watch.evaluated(self.step, self.seconds, values)

    def _stopping(self, stop: list[int]) -> bool:
        """Whether a signal reached any process: they can only stop together."""
        return bool(stop) if self.world.size == 1 else bool(self.world.all_sum(torch.tensor([float(len(stop))])))
