"""Capturing activations in a forward: hidden states, and the queries, keys and values of self-attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from hf_distill._compat import observing_attention
from hf_distill._types import Keywords
from hf_distill.errors import SettingError
from hf_distill.functional.rows import in_full_precision
from hf_distill.models.blocks import (
    Blocks,
    as_positions,
    find_blocks,
    last_hidden_in,
    numbers_in,
    stream_in,
    stream_out,
    text_config,
)
from hf_distill.signals import ATTENTION, EMBEDDINGS, HIDDEN, LAST_HIDDEN, RELATED, ActivationKey, Side
from hf_distill.tasks.infer import config_of


@dataclass(frozen=True)
class AttentionRecord:
    """The inputs of an attention function: queries and keys (after rotary positions), mask and bias.

    Attributes:
        queries: `[b h t d]`.
        keys: `[b g s d]`, g groups of heads (g = h without grouped keys).
        scaling: factor of the product.
        bias: `[b|1 h t s]` added to it (T5), or None.
        softcap: soft cap of the scores, or None.
        mask: the mask that the attention function got: additive, bool, or None.
        causal: whether a query sees only keys up to its own position.
        window: number of keys that a query sees (itself and those before it), where the mask does not show it; None
            means all.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    bias: Tensor | None
    softcap: float | None
    mask: Tensor | None
    causal: bool
    window: int | None = None

    def scores(self, keep: Tensor | None = None) -> Tensor:
        """Return the scores `[b h t s]` before mask and softmax, in full precision.

        Args:
            keep: `[b t]` bool, the valid positions; others are not read. None means all.
        """
        queries, keys = in_full_precision(self.queries), in_full_precision(self.keys)
        if keep is not None:  # fill first, because 0 · NaN is NaN, in the gradient too
            elsewhere = ~keep[:, None, :, None]
            queries, keys = queries.masked_fill(elsewhere, 0.0), keys.masked_fill(elsewhere, 0.0)
        if keys.shape[1] != queries.shape[1]:
            keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries @ keys.transpose(-1, -2) * self.scaling
        if self.bias is not None:
            scores = scores + self.bias
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.mask is not None and self.mask.dim() == 4 and self.mask.dtype != torch.bool:
            added = self.mask[..., : keys.shape[-2]]  # BEiT passes its bias in the mask
            scores = scores + added.masked_fill(added <= _hidden(added), 0.0)
        return scores

    def allowed(self) -> Tensor:
        """Return `[1|b 1|h t s]` bool: the keys that a query may attend to according to the mask."""
        t, s = self.queries.shape[2], self.keys.shape[2]
        device = self.queries.device
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask[..., :s]
            return mask if mask.dtype == torch.bool else mask > _hidden(mask)
        allowed = torch.ones(t, s, dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed.tril(s - t)
        if self.window is not None:
            allowed = allowed.triu(s - t - self.window + 1)
        if self.mask is not None and self.mask.dim() == 2:  # flash attention gets padding only
            return allowed[None, None] & self.mask[:, None, None, :s].bool()
        return allowed[None, None]


def _hidden(mask: Tensor) -> float:
    """Return the value at or below which an additive mask hides a key."""
    return torch.finfo(mask.dtype).min / 2


# Names of the three projections, and of one that computes all three side by side.
_NAMES = {
    "queries": ("query", "q_proj", "q_lin", "q", "query_proj", "q_linear", "linear_q", "wq"),
    "keys": ("key", "k_proj", "k_lin", "k", "key_proj", "k_linear", "linear_k", "wk"),
    "values": ("value", "v_proj", "v_lin", "v", "value_proj", "v_linear", "linear_v", "wv"),
}
_FUSED = ("c_attn", "Wqkv", "qkv", "qkv_proj")
# Their projections compute on [time, example, width].
_TIME_FIRST = ("LongformerSelfAttention", "LEDEncoderSelfAttention")
# Heads or partitions lie interleaved there, not queries, keys and values side by side.
_INTERLEAVED = ("CodeGenAttention", "GPTBigCodeAttention", "MiniMaxLightningAttention")
# Cross-attention is not a relation within this sequence.
_CROSS = ("crossattention", "encoder_attn", "EncDecAttention", "cross_attn", "multihead_attn")


class Source(NamedTuple):
    """A module, and a function that takes the activation from its output and input."""

    module: nn.Module
    part: Callable[[Tensor, Tensor], Tensor]


def sources_of(block: nn.Module, what: str, *, whose: str, layer: int) -> Source:
    """Return the module whose output holds the queries, keys or values of a block's self-attention.

    Raises:
        SettingError: if none is known by name, or several are.
    """
    own = {name: module for name, module in block.named_modules() if not is_cross_attention(name)}

    def called(known: tuple[str, ...], except_in: tuple[str, ...] = ()) -> list[str]:
        names = [name for name in own if name.rpartition(".")[2] in known]
        return [name for name in names if _class_around(block, name) not in except_in]

    found, fused = called(_NAMES[what]), called(_FUSED, except_in=_INTERLEAVED)
    if len(found) == 1:
        time_first = _class_around(block, found[0]) in _TIME_FIRST
        return Source(own[found[0]], _examples_first if time_first else _whole)
    if not found and len(fused) == 1:
        return Source(own[fused[0]], _third(RELATED.index(what)))
    leaves = [name for name in own if name and next(own[name].children(), None) is None]
    raise SettingError(
        f"block {layer} of the {whose} ({type(block).__name__}): {len(found) or 'no'} modules for its {what} were "
        f"found. Known names: {', '.join((*_NAMES[what], *_FUSED))}; it has {', '.join(leaves)}. Use HiddenMatch there."
    )


def _class_around(block: nn.Module, path: str) -> str:
    """Return the class of the parent of the module at this path."""
    return type(block.get_submodule(path.rpartition(".")[0])).__name__


def _whole(given: Tensor, output: Tensor) -> Tensor:
    return output


def _examples_first(given: Tensor, output: Tensor) -> Tensor:
    return output.transpose(0, 1).clone()  # Longformer divides its queries in place afterwards


def _third(index: int) -> Callable[[Tensor, Tensor], Tensor]:
    def part(given: Tensor, output: Tensor) -> Tensor:
        if output.shape[-1] != 3 * given.shape[-1]:
            raise SettingError(
                f"a fused projection from {given.shape[-1]} to {output.shape[-1]} features is not three equal parts "
                "(grouped keys and values). Use HiddenMatch."
            )
        return output.chunk(3, dim=-1)[index]

    return part


def is_cross_attention(path: str) -> bool:
    """Return whether a module's path inside a block belongs to cross-attention."""
    return any(part in _CROSS for part in path.split("."))


Hook = Callable[[nn.Module, Any, Any], None]
RandomState = list[tuple[torch.device, Tensor]]  # a device, and the state of its generator


def layerdrop_of(holder: nn.Module) -> float:
    """Return the share of blocks that LayerDrop skips in training.

    >>> layerdrop_of(nn.Linear(1, 1))
    0.0
    """
    return next((rate for _, _, rate in _settings(holder)), 0.0)


def random_state(*values: object) -> RandomState:
    """Return the state of the random generators of the CPU and of the device of these tensors."""
    return _states({x.device for x in values if isinstance(x, Tensor)} | {torch.device("cpu")})


def input_of_stack(
    holder: nn.Module, blocks: nn.Module, args: tuple[Any, ...], keywords: Keywords, before: RandomState
) -> Tensor:
    """Return the input that the first block would have got.

    Args:
        holder: the module that holds and runs the blocks.
        blocks: the list of blocks in it.
        args: the positional arguments of the holder's call.
        keywords: the keyword arguments of the call.
        before: the random state in which its forward began.
    """
    now = _states([device for device, _ in before])
    name, first = next(blocks.named_children())
    try:
        _restore(before)
        with _without_layerdrop(holder):
            setattr(blocks, name, _End())
            # Clones: HuBERT writes into its input, which the backward of the first run needs as it is.
            holder(*map(_cloned, args), **{name: _cloned(value) for name, value in keywords.items()})
    except _EndError as end:
        return end.stream
    finally:
        setattr(blocks, name, first)
        _restore(now)
    raise AssertionError(f"{type(holder).__name__} has run without its first block")


class _EndError(Exception):
    """The first block was reached."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


class _End(nn.Module):
    """Stands for the first block, without hooks and checkpointing, and ends the forward."""

    def forward(self, *args: Any, **keywords: Any) -> None:
        stream = stream_in(args, keywords)
        assert stream is not None  # every block gets it
        raise _EndError(stream)


def _settings(holder: nn.Module) -> Iterator[tuple[object, str, float]]:
    """Yield the settings that hold LayerDrop's rate for this module: object, name, value."""
    config = config_of(holder)
    for place, name in ((holder, "layerdrop"), (config, "layerdrop"), (config, "speech_encoder_layerdrop")):
        rate = getattr(place, name, None)
        if isinstance(rate, (int, float)):
            yield place, name, float(rate)


@contextlib.contextmanager
def _without_layerdrop(holder: nn.Module) -> Iterator[None]:
    """Inside this context no block is skipped, and the running statistics of batch norms do not change."""
    norms = [module for module in holder.modules() if isinstance(module, _BatchNorm)]
    changed = [(place, name, rate, 0.0) for place, name, rate in _settings(holder)]
    changed += [(norm, "track_running_stats", norm.track_running_stats, False) for norm in norms]
    try:
        for place, name, _, value in changed:
            setattr(place, name, value)
        yield
    finally:
        for place, name, before, _ in changed:
            setattr(place, name, before)


def _states(devices: Iterable[torch.device]) -> RandomState:
    return [(device, _generators_of(device).get_rng_state(*_which(device))) for device in devices]


def _restore(states: RandomState) -> None:
    for device, state in states:
        _generators_of(device).set_rng_state(state, *_which(device))


def _generators_of(device: torch.device) -> ModuleType:
    """Return the module of torch that holds the device's generator."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """Return the arguments that choose a generator; none where there is only one."""
    return () if device.type in ("cpu", "mps") else (device,)


def _cloned(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def start_token_of(config: PreTrainedConfig | None) -> int | None:
    """Return the `bos_token_id` in the config of the text decoder."""
    found = numbers_in(text_config(config), "bos_token_id")
    return found[0] if found else None


class ActivationCapture:
    """Captures activations of one model.

    Args:
        model: plain or PEFT, before it is wrapped for several processes.
        whose: "student" or "teacher", for messages.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1))
    >>> capture, key = ActivationCapture(model, "student"), ActivationKey("hidden", 1)
    >>> with capture.capture({key}) as activations:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> activations[key].shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, model: nn.Module, whose: str) -> None:
        self.whose = whose
        self._model = model
        self._found: dict[tuple[str | None, str | None], Blocks] = {}

    @property
    def start_token(self) -> int | None:
        """Return the `bos_token_id` in its config."""
        return start_token_of(config_of(self._model))

    def blocks(self, side: Side | None = None, stack: str | None = None) -> Blocks:
        """Return the blocks of a side; raise SettingError, naming all lists of modules, if they are not found."""
        if (side, stack) not in self._found:
            self._found[side, stack] = find_blocks(self._model, whose=self.whose, side=side, stack=stack)
        return self._found[side, stack]

    @contextlib.contextmanager
    def capture(self, keys: Iterable[ActivationKey], *, validate: bool = True) -> Iterator[Activations]:
        """Capture activations of one forward; the mapping is complete when the block ends.

        Args:
            keys: the activations to capture.
            validate: whether to validate at the end of the block; if not, call `validate()` before using the mapping.

        Raises:
            SettingError: at the end, if an activation was not seen: the block did not run, or its attention is computed
                in a way that cannot be observed.
        """
        keys = frozenset(keys)
        if not keys:
            yield Activations([])
            return
        stacks: list[_StackCapture] = []
        activations = Activations(stacks)
        with contextlib.ExitStack() as hooks:
            for place in {(key.side, key.stack) for key in keys}:
                own = {key for key in keys if (key.side, key.stack) == place}
                stacks.append(_StackCapture(self.blocks(*place), own, activations, self.whose))
            for stack in stacks:
                stack.attach(hooks)
            if any(key.what == ATTENTION for key in keys):
                hooks.enter_context(observing_attention(lambda *call: _observe(stacks, *call)))
            yield activations
        if validate:
            activations.validate()


class Activations(dict[ActivationKey, Any]):
    """The captured activations of one forward, by key."""

    def __init__(self, stacks: list[_StackCapture]) -> None:
        super().__init__()
        self._stacks = stacks

    def validate(self) -> Activations:
        """Bring activations to `[b t d]`, and check that all were seen.

        Raises:
            SettingError: if one was not seen, or has no gradient.
        """
        stacks, self._stacks = self._stacks, []
        for stack in stacks:
            stack.finish()
        return self


def _observe(
    stacks: list[_StackCapture], module: nn.Module, query: Tensor, key: Tensor, mask: object, settings: Keywords
) -> None:
    for stack in stacks:
        stack.on_attention(module, query, key, mask, settings)


class _StackCapture:
    """One forward of one stack of blocks."""

    def __init__(self, blocks: Blocks, keys: set[ActivationKey], seen: dict[ActivationKey, Any], whose: str) -> None:
        self._blocks, self._keys, self._seen, self._whose = blocks, keys, seen, whose
        self._hidden = {key.layer: key for key in keys if key.what == HIDDEN}
        self._attention = {key.layer: key for key in keys if key.what == ATTENTION}
        self._called = False
        self._calls = 0
        self._running = -1  # the layer that runs now
        self._ran: set[int] = set()
        self._stream: Tensor | None = None  # the output of the last block so far
        self._length: int | None = None  # of the model's output, if it pads inside
        self._began: RandomState | None = None  # before the forward of the module that holds the blocks
        self._all_dropped = False  # by LayerDrop
        self._attention_modules: set[int] = set()

    def attach(self, hooks: contextlib.ExitStack) -> None:
        """Register all hooks; closing `hooks` removes them."""
        blocks, holder, owner = self._blocks, self._blocks.holder, self._blocks.owner
        needed = {key.layer for key in self._keys if key.what == ATTENTION or key.what in RELATED}
        if self._hidden or blocks.shared or layerdrop_of(holder) > 0:  # any block may be skipped
            needed = set(range(len(blocks.modules)))

        def add(handle: RemovableHandle) -> None:
            hooks.callback(handle.remove)

        add(holder.register_forward_pre_hook(self._before_stack, with_kwargs=True))
        for index in sorted(needed):
            module = blocks.modules[index]
            add(module.register_forward_pre_hook(self._before(index), with_kwargs=True))
            add(module.register_forward_hook(self._after_block))
        for layer in self._attention:
            for block in self._modules(layer):
                names = block.named_modules(remove_duplicate=False)
                self._attention_modules |= {id(module) for name, module in names if not is_cross_attention(name)}
        add(holder.register_forward_hook(self._after_stack, with_kwargs=True))
        if blocks.pads_inside:
            add(owner.register_forward_hook(self._measure_length))
        for key in self._keys:
            if key.what in RELATED:
                for block in self._modules(key.layer):
                    source = sources_of(block, key.what, whose=self._whose, layer=key.layer)
                    add(source.module.register_forward_hook(self._after_projection(key, source.part)))
            elif key.what == LAST_HIDDEN:
                add(owner.register_forward_hook(self._after_owner(key)))

    def _modules(self, layer: int) -> tuple[nn.Module, ...]:
        """Return the blocks that compute a layer: all of them if they share weights."""
        return self._blocks.modules if self._blocks.shared else (self._blocks.modules[layer],)

    def _after_projection(self, key: ActivationKey, part: Callable[[Tensor, Tensor], Tensor]) -> Hook:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            # The first call: DeBERTa calls the same modules again, with its relative positions.
            if self._running == key.layer and key not in self._seen:
                self._seen[key] = part(inputs[0], output)

        return hook

    def _before(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Keywords], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: Keywords) -> None:
            self._running = self._calls if self._blocks.shared else index
            self._ran.add(self._running)
            stream = stream_in(args, keywords)
            if stream is None:
                return
            # The input is also the output of the embeddings, or of the blocks that LayerDrop skipped before this one.
            for layer, key in self._hidden.items():
                if layer < self._running and key not in self._seen:
                    self._seen[key] = stream

        return hook

    def _after_block(self, module: nn.Module, inputs: object, output: object) -> None:
        self._stream = stream_out(output)
        if self._running in self._hidden:
            self._seen[self._hidden[self._running]] = self._stream
        self._calls += 1
        self._running = -1

    def _before_stack(self, module: nn.Module, args: tuple[Any, ...], keywords: Keywords) -> None:
        self._called = True
        if self._hidden and module.training and layerdrop_of(module) > 0 and not self._all_dropped:
            self._began = random_state(*args, *keywords.values())

    def _after_stack(self, module: nn.Module, args: tuple[Any, ...], keywords: Keywords, output: object) -> None:
        if self._began is None or self._ran or self._all_dropped:
            return
        self._all_dropped = True  # set first, because the stack runs again
        blocks = module.get_submodule(self._blocks.path.rpartition(".")[2])
        self._stream = input_of_stack(module, blocks, args, keywords, self._began)

    def _after_owner(self, key: ActivationKey) -> Hook:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            last = last_hidden_in(output)
            if last is not None:
                self._seen[key] = last

        return hook

    def _measure_length(self, module: nn.Module, inputs: object, output: object) -> None:
        last = last_hidden_in(output)
        self._length = None if last is None else last.shape[1]

    def on_attention(self, module: nn.Module, query: Tensor, key: Tensor, mask: object, settings: Keywords) -> None:
        """Record a call of an attention function by any module, if it belongs to a layer that is captured."""
        captured = self._attention.get(self._running)
        if captured is None or id(module) not in self._attention_modules:
            return
        _check_masks(module, mask, settings)
        causal = settings.get("is_causal")
        scaling = settings.get("scaling")
        self._seen[captured] = AttentionRecord(
            queries=query,
            keys=key,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            bias=settings.get("position_bias"),
            softcap=settings.get("softcap"),
            mask=mask if isinstance(mask, Tensor) else None,
            causal=bool(getattr(module, "is_causal", False) if causal is None else causal),
            window=settings.get("sliding_window"),
        )

    def finish(self) -> None:
        """Bring activations to `[b t d]`; raise SettingError if one was not seen, or has no gradient."""
        for layer, key in self._hidden.items():
            if key not in self._seen and self._stream is not None and (layer != EMBEDDINGS or self._all_dropped):
                self._seen[key] = self._stream  # LayerDrop skipped the last blocks, or all
        for key in sorted(self._keys - set(self._seen)):
            raise SettingError(f"{self._named(key)}: {self._why_not_seen(key)}")
        for key in self._keys:
            if self._length is not None and (key.what == HIDDEN or key.what in RELATED):
                self._seen[key] = self._seen[key][:, : self._length]
            if key.what in (HIDDEN, LAST_HIDDEN):
                layer = 0 if key.what == LAST_HIDDEN else key.layer
                features, config = self._blocks.features.get((key.what, layer)), config_of(self._blocks.owner)
                self._seen[key] = as_positions(self._seen[key], features, config, what=self._named(key))
        if torch.is_grad_enabled() and self._whose == "student":
            self._check_graphs()

    def _named(self, key: ActivationKey) -> str:
        return f"{key.what} of block {key.layer} of the {self._whose} ({self._blocks.path})"

    def _why_not_seen(self, key: ActivationKey) -> str:
        owner, holder = type(self._blocks.owner).__name__, type(self._blocks.holder).__name__
        if key.what == LAST_HIDDEN and self._called:
            return f"{owner} returns no last_hidden_state. Use HiddenMatch."
        if not self._called and not self._ran:
            return (
                f"no block ran. The model that was called is not the {self._whose} that the distiller was made for "
                "(make it with this one, or call distiller.bind)."
            )
        if not self._ran and not layerdrop_of(self._blocks.holder):
            return (
                f"no block ran as a module. {holder} bypasses the hooks of its blocks (SqueezeBERT calls their forward "
                "functions). Use CosineEmbedding, or predictions only."
            )
        if key.what != LAST_HIDDEN and key.layer not in self._ran:
            return (
                "the block did not run in this forward. If LayerDrop skipped it, set layerdrop to 0 in the config, or "
                "use HiddenMatch, which reads the hidden state that bypassed it."
            )
        if key.what == ATTENTION:
            return (
                "its attention does not go through transformers' AttentionInterface (DeBERTa, MPNet and WavLM compute "
                "their own), or it has none, so no scores can be read. Use RelationMatch or HiddenMatch."
            )
        return "its module was not called (WavLM passes its weights to a function). Use HiddenMatch."

    def _check_graphs(self) -> None:
        """Raise SettingError if an activation of the student carries no gradient."""
        trained = any(p.requires_grad for p in self._blocks.owner.parameters())
        for key in self._keys:
            value = self._seen[key]
            tensors = [value.queries, value.keys] if key.what == ATTENTION else [value]
            if not trained or key.layer == EMBEDDINGS or any(x.requires_grad for x in tensors):
                continue
            if key.what != ATTENTION and self._dropped_below(key):
                # LayerDrop skipped the blocks whose parameters are trained (adapters): a leaf lets a backward work.
                self._seen[key] = value.detach().requires_grad_()
                continue
            raise SettingError(
                f"{key.what} of block {key.layer} of the student has no gradient: gradient checkpointing with "
                "use_reentrant=True hides it, the block and those below it are frozen, or the model runs its blocks "
                "in its own backward (Reformer, which can only be a teacher here). Pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or match a block that is trained.'
            )

    def _dropped_below(self, key: ActivationKey) -> bool:
        """Return whether LayerDrop skipped a block that this activation depends on."""
        last = self._blocks.length - 1 if key.what == LAST_HIDDEN else key.layer
        return layerdrop_of(self._blocks.holder) > 0 and not self._ran.issuperset(range(last + 1))


def _check_masks(module: nn.Module, mask: object, settings: Keywords) -> None:
    """Raise if the mask of the attention cannot be observed: pairs that never attend would be compared."""
    name = getattr(config_of(module), "_attn_implementation", None) or ""
    positions = settings.get("position_ids")
    packed = name.startswith("flash") and positions is not None and bool((positions.diff(dim=-1) < 0).any())
    if mask is not None and not isinstance(mask, Tensor):
        why = f"the mask is a {type(mask).__name__} (flex attention), which hides it"
    elif packed or settings.get("cu_seq_lens_q") is not None:
        why = "sequences are packed under flash attention, which hides the sequence of each key"
    elif settings.get("s_aux") is not None:
        why = "it has attention sinks, which are not scores of keys; no implementation shows them. Use RelationMatch"
    else:
        return
    raise SettingError(
        f"AttentionMatch on {type(module).__name__}: {why}. Otherwise load the model with attn_implementation='sdpa'."
    )
