"""OutputHead: replacing a model's output head for one forward, so that its logits are never computed.

What the model does to the logits after the head (a scale, a soft cap, a bias) is read from its config and then
verified: some positions of one example are run through the model and compared with the formula, also enlarged so that
an unknown soft cap would show. A head that does not agree is not replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from hf_distill._types import Batch
from hf_distill.models.blocks import text_config
from hf_distill.models.generation import evaluating
from hf_distill.models.packing import is_sharded
from hf_distill.signals import DeferredLogits
from hf_distill.tasks.base import output_named
from hf_distill.tasks.infer import unwrapped

POSITIONS = 16  # positions tried, of one example
LARGE = 1e3  # of the enlarged logits; caps are 15 to 50
LARGEST_HIDDEN = 3e4  # within fp16
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative to the largest value; in 16 bits 1e-2


class OutputHead:
    """The last product of a model: hidden states times the weight of a vocabulary.

    Attributes:
        refusal: why the head cannot be replaced, or None.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    >>> head, recorded = OutputHead(model), []
    >>> with head.listened(recorded):
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> recorded[0].hidden.shape, recorded[0].weight.shape
    (torch.Size([1, 3, 4]), torch.Size([9, 4]))
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._adds_positions = _adds_positions(model)
        find = getattr(self._model, "get_output_embeddings", None)
        self._module: Any = None if find is None else find()
        self._work: Callable[[DeferredLogits], Tensor] | None = None
        self.refusal = self._why_not()

    @property
    def columns(self) -> int:
        """Return the number of columns; 0 without such a head."""
        return int(getattr(self._module, "out_features", 0))

    def is_sharded(self) -> bool:
        """Return whether the weight is sharded between forwards (FSDP2, tensor parallelism, ZeRO-3)."""
        return is_sharded(self._module)

    @contextlib.contextmanager
    def replaced(self, work: Callable[[DeferredLogits], Tensor]) -> Iterator[None]:
        """Let each forward call `work` in place of the head, and return its scalar in place of the logits.

        The scalar carries the graph, so that DDP and FSDP, which wait for gradients of the outputs, work. It is
        computed within the head's hooks and autocast, and the logits of the output are this number, repeated.
        """
        self._work = work
        self._module.forward = self._forward  # the same function each time: a compiled model is compiled once
        try:
            yield
        finally:
            del self._module.forward
            self._work = None

    @contextlib.contextmanager
    def listened(self, inputs: list[DeferredLogits]) -> Iterator[None]:
        """Let each forward, without gradient, append the head's input to a list, and compute no logits."""

        def record(given: DeferredLogits) -> Tensor:
            inputs.append(given)
            return given.hidden.new_zeros(())

        with self.replaced(record):
            yield

    def _why_not(self) -> str | None:
        name, module = type(self._model).__name__, self._module
        if module is None:
            return f"{name}.get_output_embeddings() names no output head"
        if not _is_linear(module):
            return (
                f"the output head of {name} is a {type(module).__module__}.{type(module).__name__}, and not a plain "
                "nn.Linear (an adapter on it, or quantised: leave it out of both)"
            )
        if self._adds_positions:
            return f"{name} is given positions of its own (PEFT prompt tuning)"
        if "forward" in vars(module):
            return f"the output head of {name} has another forward already (offloading, tensor parallelism)"
        return None

    @torch.compiler.disable
    def _forward(self, hidden: Tensor) -> Tensor:
        assert self._work is not None  # set by `replaced`
        scalar = self._work(self._deferred(hidden))
        # Not a view, because models write into their logits.
        return scalar.to(hidden.dtype).expand(*[1] * (hidden.dim() - 1), self.columns).clone()

    def _deferred(self, hidden: Tensor) -> DeferredLogits:
        scale, softcap = _after_the_head(self._model.config)
        bias, later = self._module.bias, getattr(self._model, "final_logits_bias", None)
        if isinstance(later, Tensor):  # BART, Marian, Pegasus
            bias = later.flatten() if bias is None else bias + later.flatten()
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._module.weight.dtype
        return DeferredLogits(hidden, self._module.weight, bias, scale, softcap, dtype)

    # The trial.

    @torch.no_grad()
    def trial(self, inputs: Batch, labelled: Mapping[str, Tensor], *, wrapped: nn.Module | None = None) -> Trial | str:
        """Run a batch through the model, and return some logits of one example, or why the head cannot be replaced.

        This does not depend on the labels, so that several processes all try at the same step.

        Args:
            inputs: the inputs of the model, without labels.
            labelled: labels `[b t]` that the model takes, by name; made-up ones replace them.
            wrapped: the model as a loop calls it.
        """
        # Under FSDP 1 weights are whole only within the wrapper's forward; elsewhere it would only add to the work.
        model = wrapped if isinstance(wrapped, FullyShardedDataParallel) else self._model
        known = {}
        for name, labels in labelled.items():
            made_up = torch.arange(min(labels.shape[1], POSITIONS), device=labels.device) % self.columns
            known[name] = made_up[None].to(labels.dtype)
        with evaluating(self._model):
            found = self._run(model, {**inputs, **known})
            enlarged = found if isinstance(found, str) else self._run(model, {**inputs, **known}, LARGE / found.largest)
        if isinstance(found, str) or isinstance(enlarged, str):
            return str(enlarged)
        if known and found.outputs.get("aux_loss") is not None:
            return f"{type(self._model).__name__} adds a loss of its own (aux_loss)"
        return Trial(found.logits, known, found.outputs.get("loss") if known else None)

    def _run(self, model: nn.Module, inputs: Batch, factor: float = 1.0) -> _Run | str:
        """Run one forward on some positions, with hidden states times a factor; return it, or the disagreement."""
        calls: list[tuple[Tensor, Tensor]] = []

        def compute_some(hidden: Tensor) -> Tensor:
            hidden = hidden[:1, :POSITIONS]  # cut here: not every input has an axis of examples
            part = self._deferred(hidden * min(factor, LARGEST_HIDDEN / float(hidden.abs().amax().clamp(min=1))))
            made = nn.functional.linear(part.hidden, self._module.weight, self._module.bias)
            calls.append((made, logits_of(part)))
            return made.clone()  # models write into their logits

        self._module.forward = compute_some
        try:
            outputs = model(**inputs)
        finally:
            del self._module.forward
        name = type(self._model).__name__
        if len(calls) != 1 or calls[0][0].dim() != 3:
            return f"{name} does not call its output head once, on [batch, time, width]"
        (made, expected), logits = calls[0], output_named("logits", outputs).float()
        if logits.shape != expected.shape or not _close(logits, expected.float(), made.dtype):
            return f"{name} does more to its logits after the output head than scale them, cap them or add a bias"
        return _Run(outputs, logits, max(1.0, float(made.abs().amax())))


@dataclass(frozen=True)
class _Run:
    """A model's outputs, its logits in full precision, and the largest value of its head, at least 1."""

    outputs: ModelOutput
    logits: Tensor
    largest: float


class Trial:
    """A model's outputs at some positions of one example.

    Attributes:
        logits: `[1 t v]`.
        labels: `[1 t]` each, by name.
        loss: the model's own loss on these labels; None without labels.
    """

    def __init__(self, logits: Tensor, labels: Mapping[str, Tensor], loss: Tensor | None) -> None:
        self.logits, self.labels, self.loss = logits, labels, loss

    def loss_is(self, value: Tensor) -> bool:
        """Return whether the model's own loss equals this one up to rounding, or is unknown (no labels)."""
        return self.loss is None or bool(self.loss.isnan()) or _close(self.loss, value.float(), self.loss.dtype)


def logits_of(deferred: DeferredLogits) -> Tensor:
    """Return the deferred logits `[b t v]`."""
    x = nn.functional.linear(deferred.hidden, deferred.weight, deferred.bias) * deferred.logit_scale
    return x if deferred.softcap is None else torch.tanh(x / deferred.softcap) * deferred.softcap


def _adds_positions(model: nn.Module) -> bool:
    """Return whether PEFT adds positions to the input (all its prompts except prefix tuning)."""
    adapter: Any = getattr(getattr(model, "_orig_mod", model), "active_peft_config", None)
    return bool(getattr(adapter, "is_prompt_learning", False)) and adapter.peft_type != "PREFIX_TUNING"


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is linear; FSDP2 replaces the class of each module that it shards."""
    kind = type(module)
    return kind is nn.Linear or (issubclass(kind, FSDPModule) and kind.__bases__ == (FSDPModule, nn.Linear))


def _after_the_head(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Return the factor on the logits and their soft cap, from a config."""
    text = text_config(config)
    scale = 1.0
    for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        value = getattr(text, name, None)
        if isinstance(value, (int, float)) and value:  # MPT has a word there, which it ignores
            scale *= float(value) ** power
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    return scale, next((cap for cap in (getattr(text, name, None) for name in caps) if cap), None)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two tensors are equal up to rounding in `dtype`."""
    largest = expected.abs().amax().clamp(min=1e-6)
    return bool((found - expected).abs().amax() <= _TOLERANCE.get(dtype, 1e-2) * largest)
