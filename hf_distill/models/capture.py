"""Capturing activations in a forward: hidden states, and the queries, keys and values of self-attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_distill._compat import observing_attention
from hf_distill.errors import SettingError
from hf_distill.functional.rows import in_full_precision
from hf_distill.models.blocks import Blocks, as_positions, ended_in, find_blocks, passed_on
from hf_distill.signals import ATTENTION, EMBEDDINGS, HIDDEN, LAST_HIDDEN, RELATED, ActivationKey, Side


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
        window: how many keys back a query sees, if the mask does not say; None means all.
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
    own = {name: m for name, m in block.named_modules() if not any(part in _CROSS for part in name.split("."))}
    found = [name for name in own if name.rpartition(".")[2] in _NAMES[what]]
    if len(found) == 1:
        time_first = _class_around(block, found[0]) in _TIME_FIRST
        return Source(own[found[0]], _examples_first if time_first else _whole)
    fused = [m for name, m in own.items() if name.rpartition(".")[2] in _FUSED and not _interleaves(block, name)]
    if not found and len(fused) == 1:
        return Source(fused[0], _third(RELATED.index(what)))
    names = [name for name in own if name and not any(True for _ in own[name].children())]
    raise SettingError(
        f"block {layer} of the {whose} ({type(block).__name__}): {len(found) or 'no'} modules for its {what} were "
        f"found. Known names: {', '.join((*_NAMES[what], *_FUSED))}; it has {', '.join(names)}. Use HiddenMatch there."
    )


def _interleaves(block: nn.Module, path: str) -> bool:
    return _class_around(block, path) in _INTERLEAVED


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
                f"a fused projection makes {output.shape[-1]} numbers of {given.shape[-1]}, which are not three equal "
                "parts (grouped keys and values). Its relations cannot be told apart; use HiddenMatch."
            )
        return output.chunk(3, dim=-1)[index]

    return part


def is_cross_attention(path: str) -> bool:
    """Return whether a module's path inside a block belongs to cross-attention."""
    return any(part in _CROSS for part in path.split("."))


RandomState = list[tuple[torch.device, Tensor]]  # a device, and the state of its generator


def layerdrop_of(holder: nn.Module) -> float:
    """Return the share of blocks that LayerDrop skips in training.

    >>> layerdrop_of(nn.Linear(1, 1))
    0.0
    """
    return next((rate for _, _, rate in _settings(holder)), 0.0)


def random_state(*values: Any) -> RandomState:
    """Return the state of the random generators of the CPU and of the device of these tensors."""
    devices = {x.device for x in values if isinstance(x, Tensor)} | {torch.device("cpu")}
    return [(device, _state_of(device)) for device in devices]


def input_of_stack(
    holder: nn.Module, blocks: Any, args: tuple[Any, ...], keywords: Mapping[str, Any], before: RandomState
) -> Tensor:
    """Return the input that the first block would have got.

    Args:
        holder: the module that holds and runs the blocks.
        blocks: the list of blocks in it.
        args: the positional arguments of the holder's call.
        keywords: the keyword arguments of the call.
        before: the random state in which its forward began.
    """
    now = [(device, _state_of(device)) for device, _ in before]
    first = blocks[0]
    try:
        _restore(before)
        with _without_layerdrop(holder):
            blocks[0] = _End()
            # Clones: HuBERT writes into its input, which the backward of the first run needs as it is.
            holder(*map(_cloned, args), **{name: _cloned(value) for name, value in keywords.items()})
    except _EndError as end:
        return end.stream
    finally:
        blocks[0] = first
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
        raise _EndError(args[0] if args else keywords["hidden_states"])


def _settings(holder: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """Yield the settings that hold LayerDrop's rate for this module: object, name, value."""
    config = getattr(holder, "config", None)
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


def _state_of(device: torch.device) -> Tensor:
    source, which = _generator_of(device)
    state: Tensor = source.get_rng_state(*which)
    return state


def _restore(states: RandomState) -> None:
    for device, state in states:
        source, which = _generator_of(device)
        source.set_rng_state(state, *which)


def _generator_of(device: torch.device) -> tuple[Any, tuple[torch.device, ...]]:
    """The module of torch that draws on a device, and what it wants to know of it: where there is one, nothing."""
    if device.type == "cpu":
        return torch, ()
    return torch.get_device_module(device), () if device.type == "mps" else (device,)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def start_token_of(config: Any) -> int | None:
    """Return the `bos_token_id` in the config of the text decoder."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "bos_token_id", None)
    return found if isinstance(found, int) else None


class ActivationCapture:
    """Captures activations of one model.

    Args:
        model: plain or PEFT, before it is wrapped for several processes.
        whose: "student" or "teacher", for messages.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1))
    >>> inside, read = ActivationCapture(model, "student"), ActivationKey("hidden", 1)
    >>> with inside.capture({read}) as seen:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> seen[read].shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, model: nn.Module, whose: str) -> None:
        self.whose = whose
        self._model = model
        self._found: dict[tuple[str | None, str | None], Blocks] = {}

    @property
    def start_token(self) -> int | None:
        """Return the `bos_token_id` of its config."""
        return start_token_of(getattr(self._model, "config", None))

    def blocks(self, side: Side | None = None, stack: str | None = None) -> Blocks:
        """Return the blocks of a side; raise SettingError if they are not found, listing the candidates."""
        if (side, stack) not in self._found:
            self._found[side, stack] = find_blocks(self._model, whose=self.whose, side=side, stack=stack)
        return self._found[side, stack]

    @contextlib.contextmanager
    def capture(self, keys: Iterable[ActivationKey], *, validate: bool = True) -> Iterator[Activations]:
        """Capture activations of one forward; the mapping is complete when the block ends.

        Args:
            keys: what to capture.
            validate: whether to validate at the end of the block; if not, call `validate()` before using the mapping.

        Raises:
            SettingError: at the end, if something was not seen: the block did not run, or its attention is computed in
                a way that cannot be observed.
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


def _observe(stacks: list[_StackCapture], *call: Any) -> None:
    for stack in stacks:
        stack.on_attention(*call)


class _StackCapture:
    """One forward of one stack of blocks."""

    def __init__(self, blocks: Blocks, reads: set[ActivationKey], seen: dict[ActivationKey, Any], whose: str) -> None:
        self._blocks, self._reads, self._seen, self._whose = blocks, reads, seen, whose
        self._hidden = {read.layer: read for read in reads if read.what == HIDDEN}
        self._attention = {read.layer: read for read in reads if read.what == ATTENTION}
        self._called = False
        self._calls = 0
        self._running = -1
        self._ran: set[int] = set()
        self._stream: Tensor | None = None
        self._length: int | None = None  # of what the model returns, where it pads inside
        self._began: RandomState | None = None  # what the module that holds the blocks drew from
        self._left_out = False  # all blocks
        self._listened: set[int] = set()

    def attach(self, hooks: contextlib.ExitStack) -> None:
        heard = {read.layer for read in self._reads if read.what == ATTENTION or read.what in RELATED}
        follow = self._hidden or self._blocks.shared or layerdrop_of(self._blocks.holder) > 0  # any may be left out
        for index, module in enumerate(self._blocks.modules):
            if not (follow or index in heard):
                continue
            for hook in (
                module.register_forward_pre_hook(self._before(index), with_kwargs=True),
                module.register_forward_hook(self._after(index)),
            ):
                hooks.callback(hook.remove)
        if self._attention:
            wanted = self._blocks.modules if self._blocks.shared else self._modules(self._attention)
            for block in wanted:
                names = dict(block.named_modules(remove_duplicate=False))
                self._listened |= {id(module) for name, module in names.items() if not is_cross_attention(name)}
        holder = self._blocks.holder
        hooks.callback(holder.register_forward_pre_hook(self._before_stack, with_kwargs=True).remove)
        hooks.callback(holder.register_forward_hook(self._after_stack, with_kwargs=True).remove)
        if self._blocks.pads_inside:
            hooks.callback(self._blocks.owner.register_forward_hook(self._measure_length).remove)
        for read in self._reads:
            if read.what in RELATED:
                self._attach_related(read, hooks)
            elif read.what == LAST_HIDDEN:
                hook = self._blocks.owner.register_forward_hook(self._owner_ended(read))
                hooks.callback(hook.remove)

    def _modules(self, layers: Mapping[int, ActivationKey]) -> list[nn.Module]:
        return [self._blocks.modules[layer] for layer in layers]

    def _attach_related(self, read: ActivationKey, hooks: contextlib.ExitStack) -> None:
        """Attach hooks for queries, keys or values, on every block if they share weights."""
        blocks = self._blocks.modules if self._blocks.shared else self._modules({read.layer: read})
        for block in blocks:
            source = sources_of(block, read.what, whose=self._whose, layer=read.layer)
            hook = source.module.register_forward_hook(self._related(read, source.part))
            hooks.callback(hook.remove)

    def _related(self, read: ActivationKey, part: Callable[[Tensor, Tensor], Tensor]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # The first call: DeBERTa calls the same modules again, with its relative positions.
            if self._running == read.layer and read not in self._seen:
                self._seen[read] = part(inputs[0], output)

        return hook

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._running = self._calls if self._blocks.shared else index
            self._ran.add(self._running)
            stream = args[0] if args else keywords.get("hidden_states")
            if not isinstance(stream, Tensor):
                return
            # The input is also what blocks put out that were left out (layerdrop), and what the embeddings did.
            for layer, read in self._hidden.items():
                if layer < self._running and read not in self._seen:
                    self._seen[read] = stream

        return hook

    def _after(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._stream = passed_on(output)
            if self._running in self._hidden:
                self._seen[self._hidden[self._running]] = self._stream
            self._calls += 1
            self._running = -1

        return hook

    def _before_stack(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._called = True
        if self._hidden and module.training and layerdrop_of(module) > 0 and not self._left_out:
            self._began = random_state(*args, *keywords.values())

    def _after_stack(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if self._began is None or self._ran or self._left_out:
            return
        self._left_out = True  # now, as the stack is run again
        blocks = module.get_submodule(self._blocks.path.rpartition(".")[2])
        self._stream = input_of_stack(module, blocks, args, keywords, self._began)

    def _owner_ended(self, read: ActivationKey) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            last = ended_in(output)
            if isinstance(last, Tensor):
                self._seen[read] = last

        return hook

    def _measure_length(self, module: nn.Module, inputs: Any, output: Any) -> None:
        last = ended_in(output)
        self._length = last.shape[1] if isinstance(last, Tensor) else None

    def on_attention(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, settings: dict[str, Any]) -> None:
        """Handle a call of an attention function of any module."""
        read = self._attention.get(self._running)
        if read is None or id(module) not in self._listened:
            return
        _check_masks(module, mask, settings)
        causal = settings.get("is_causal")
        scaling = settings.get("scaling")
        self._seen[read] = AttentionRecord(
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
        for layer, read in self._hidden.items():
            went_past = layer != EMBEDDINGS or self._left_out
            if read not in self._seen and self._stream is not None and went_past:
                self._seen[read] = self._stream  # the last blocks were left out (layerdrop), or all
        for read in sorted(self._reads - set(self._seen)):
            raise SettingError(self._not_seen(read))
        for read in self._reads:
            if self._length is not None and (read.what == HIDDEN or read.what in RELATED):
                self._seen[read] = self._seen[read][:, : self._length]
            if read.what in (HIDDEN, LAST_HIDDEN):
                self._seen[read] = self._as_positions(read)
        if torch.is_grad_enabled() and self._whose == "student":
            self._check_graphs()

    def _as_positions(self, read: ActivationKey) -> Tensor:
        """Return a hidden state as `[b t d]`."""
        layer = 0 if read.what == LAST_HIDDEN else read.layer
        features, config = self._blocks.features.get((read.what, layer)), getattr(self._blocks.owner, "config", None)
        return as_positions(self._seen[read], features, config, what=self._named(read))

    def _named(self, read: ActivationKey) -> str:
        return f"{read.what} of block {read.layer} of the {self._whose} ({self._blocks.path})"

    def _not_seen(self, read: ActivationKey) -> str:
        where = self._named(read)
        if read.what == LAST_HIDDEN and self._called:
            return f"{where}: {type(self._blocks.owner).__name__} returns no last_hidden_state. Use HiddenMatch."
        if not self._called and not self._ran:
            return (
                f"{where}: no block ran. The model that was called is not the {self._whose} that the distiller was "
                "made for (make it with this one, or call distiller.bind)."
            )
        if not self._ran and not layerdrop_of(self._blocks.holder):
            return (
                f"{where}: no block ran as a module. {type(self._blocks.holder).__name__} passes by the hooks of its "
                "blocks (SqueezeBERT calls their forward functions). Use CosineEmbedding, or the predictions alone."
            )
        if read.what != LAST_HIDDEN and read.layer not in self._ran:
            return (
                f"{where}: the block did not run in this forward. Where layerdrop left it out, set layerdrop to 0 in "
                "the config, or use HiddenMatch, which reads what went past it."
            )
        if read.what == ATTENTION:
            return (
                f"{where}: its attention does not go through transformers' AttentionInterface (DeBERTa, MPNet and "
                "WavLM compute their own), or it has none, so no scores can be read. Use RelationMatch or HiddenMatch."
            )
        return (
            f"{where}: the module is there and was not called (WavLM hands its weights to a function). Use HiddenMatch."
        )

    def _check_graphs(self) -> None:
        trained = any(p.requires_grad for p in self._blocks.owner.parameters())
        for read in self._reads:
            value = self._seen[read]
            tensors = [value.queries, value.keys] if isinstance(value, AttentionRecord) else [value]
            if not trained or read.layer == EMBEDDINGS or any(x.requires_grad for x in tensors):
                continue
            if isinstance(value, Tensor) and self._left_out_below(read):
                # The blocks whose parameters are trained (adapters) were left out: a leaf, so that a backward works.
                self._seen[read] = value.detach().requires_grad_()
                continue
            raise SettingError(
                f"{read.what} of block {read.layer} of the student has no gradient: gradient checkpointing with "
                "use_reentrant=True hides it, what is below that block is frozen, or the model runs its blocks "
                "in a backward of its own (Reformer, which can be a teacher but no student here). Pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or match a block that is trained.'
            )

    def _left_out_below(self, read: ActivationKey) -> bool:
        """Return whether LayerDrop skipped a block that this activation depends on."""
        last = self._blocks.length - 1 if read.what == LAST_HIDDEN else read.layer
        return layerdrop_of(self._blocks.holder) > 0 and not self._ran.issuperset(range(last + 1))


def _check_masks(module: nn.Module, mask: Any, settings: dict[str, Any]) -> None:
    """Raise if the mask of the attention cannot be observed: pairs that never attend would be compared."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
    positions = settings.get("position_ids")
    packed = name.startswith("flash") and positions is not None and bool((positions.diff(dim=-1) < 0).any())
    if mask is not None and not isinstance(mask, Tensor):
        why = f"the mask is a {type(mask).__name__} (flex attention), which hides it"
    elif packed or settings.get("cu_seq_lens_q") is not None:
        why = "sequences are packed under flash attention, and which key is of which sequence is hidden"
    elif settings.get("s_aux") is not None:
        why = "it has attention sinks, which are no scores of keys; no implementation shows them. Use RelationMatch"
    else:
        return
    raise SettingError(
        f"AttentionMatch on {type(module).__name__}: {why}. Else load the model with attn_implementation='sdpa'."
    )
