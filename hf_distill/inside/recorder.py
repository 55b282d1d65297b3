"""Reading a forward from inside: hidden states, attentions, queries, keys and values of chosen blocks and no others.

Hooks stand only while `reading` is open, so a recomputation in the backward (gradient checkpointing) is not read, and
the model that is saved or pickled has none. They keep references and compute nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill._compat import hearing_attention
from hf_distill.errors import SettingError
from hf_distill.inside.attention_record import AttentionRecord
from hf_distill.inside.blocks import Blocks, find_blocks
from hf_distill.inside.related import is_cross_attention, sources_of
from hf_distill.signals import ATTENTION, EMBEDDINGS, HIDDEN, LAST_HIDDEN, RELATED, Read

Seen = dict[Read, Any]


def start_token_of(config: Any) -> int | None:
    """What a config calls `bos_token_id`, of the model that writes text."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "bos_token_id", None)
    return found if isinstance(found, int) else None


class Inside:
    """The inside of one model.

    Args:
        model: plain or PEFT, before it is wrapped for several processes. whose: "student" or "teacher", for messages.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1))
    >>> inside, read = Inside(model, "student"), Read("hidden", 1)
    >>> with inside.reading({read}) as seen:
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
        """What its config calls `bos_token_id`."""
        return start_token_of(getattr(self._model, "config", None))

    def blocks(self, side: str | None = None, stack: str | None = None) -> Blocks:
        """The blocks of a side. Raises SettingError where they cannot be told; the message lists what there is."""
        if (side, stack) not in self._found:
            self._found[side, stack] = find_blocks(self._model, whose=self.whose, side=side, stack=stack)
        return self._found[side, stack]

    @contextlib.contextmanager
    def reading(self, reads: set[Read] | frozenset[Read]) -> Iterator[Mapping[Read, Any]]:
        """Read one forward. What was asked for is in the mapping when the block ends.

        Raises:
            SettingError: at the end, where something was not seen: the block did not run, or its attention is computed
                in a way that cannot be listened to.
        """
        seen: Seen = {}
        if not reads:
            yield seen
            return
        with contextlib.ExitStack() as hooks:
            stacks = []
            for place in {(read.side, read.stack) for read in reads}:
                own = {read for read in reads if (read.side, read.stack) == place}
                stacks.append(_StackReading(self.blocks(*place), own, seen, self.whose))
            for stack in stacks:
                stack.attach(hooks)
            if any(read.what == ATTENTION for read in reads):
                hooks.enter_context(hearing_attention(lambda *call: _hear(stacks, *call)))
            yield seen
        for stack in stacks:
            stack.finish()


def _hear(stacks: list[_StackReading], *call: Any) -> None:
    for stack in stacks:
        stack.hear(*call)


class _StackReading:
    """One forward of one stack of blocks."""

    def __init__(self, blocks: Blocks, reads: set[Read], seen: Seen, whose: str) -> None:
        self._blocks, self._reads, self._seen, self._whose = blocks, reads, seen, whose
        self._hidden = {read.layer: read for read in reads if read.what == HIDDEN}
        self._attention = {read.layer: read for read in reads if read.what == ATTENTION}
        self._calls = 0
        self._running = -1
        self._ran: set[int] = set()
        self._stream: Tensor | None = None
        self._listened: set[int] = set()

    def attach(self, hooks: contextlib.ExitStack) -> None:
        heard = {read.layer for read in self._reads if read.what == ATTENTION or read.what in RELATED}
        for index, module in enumerate(self._blocks.modules):
            if not (self._hidden or index in heard or self._blocks.shared):
                continue  # hidden states: all, as any may be left out by layerdrop
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
        for read in self._reads:
            if read.what in RELATED:
                self._attach_related(read, hooks)
            elif read.what == LAST_HIDDEN:
                hook = self._blocks.owner.register_forward_hook(self._owner_ended(read))
                hooks.callback(hook.remove)

    def _modules(self, layers: Mapping[int, Read]) -> list[nn.Module]:
        return [self._blocks.modules[layer] for layer in layers]

    def _attach_related(self, read: Read, hooks: contextlib.ExitStack) -> None:
        """In a model of shared layers every block is heard, and the one that runs tells which layer it is."""
        blocks = self._blocks.modules if self._blocks.shared else self._modules({read.layer: read})
        for block in blocks:
            source = sources_of(block, read.what, whose=self._whose, layer=read.layer)
            hook = source.module.register_forward_hook(self._related(read, source.part))
            hooks.callback(hook.remove)

    def _related(self, read: Read, part: Callable[[Tensor, Tensor], Tensor]) -> Any:
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
            self._stream = _first(output)
            if self._running in self._hidden:
                self._seen[self._hidden[self._running]] = self._stream
            self._calls += 1
            self._running = -1

        return hook

    def _owner_ended(self, read: Read) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[read] = output["last_hidden_state"] if isinstance(output, Mapping) else _first(output)

        return hook

    def hear(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, settings: dict[str, Any]) -> None:
        """A call of an attention function, whoever's it is."""
        read = self._attention.get(self._running)
        if read is None or id(module) not in self._listened:
            return
        _refuse_hidden_masks(module, mask, settings)
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
            if read not in self._seen and self._stream is not None and layer != EMBEDDINGS:
                self._seen[read] = self._stream  # the last blocks were left out (layerdrop)
        for read in sorted(self._reads - set(self._seen)):
            raise SettingError(self._not_seen(read))
        if torch.is_grad_enabled() and self._whose == "student":
            self._refuse_cut_graphs()

    def _not_seen(self, read: Read) -> str:
        where = f"{read.what} of block {read.layer} of the {self._whose} ({self._blocks.path})"
        if not self._ran:
            return (
                f"{where}: no block ran. The model that was called is not the {self._whose} that the distiller was "
                "made for (make it with this one, or call distiller.fit), or layerdrop left out every block."
            )
        if read.what != LAST_HIDDEN and read.layer not in self._ran:
            return (
                f"{where}: the block did not run in this forward. Where layerdrop left it out, set layerdrop to 0 in "
                "the config (HiddenMatch reads what went past it, unless all blocks were left out)."
            )
        if read.what == ATTENTION:
            return (
                f"{where}: its attention does not go through transformers' AttentionInterface (DeBERTa, MPNet and "
                "WavLM compute their own), so its scores cannot be read. Use RelationMatch or HiddenMatch."
            )
        return (
            f"{where}: the module is there and was not called (WavLM hands its weights to a function). Use HiddenMatch."
        )

    def _refuse_cut_graphs(self) -> None:
        trained = any(p.requires_grad for p in self._blocks.owner.parameters())
        for read in self._reads:
            value = self._seen[read]
            tensors = [value.queries, value.keys] if isinstance(value, AttentionRecord) else [value]
            if trained and read.layer != EMBEDDINGS and not any(x.requires_grad for x in tensors):
                raise SettingError(
                    f"{read.what} of block {read.layer} of the student has no gradient: gradient checkpointing with "
                    "use_reentrant=True hides it, or what is below that block is frozen. Pass "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}, or match a block that is trained.'
                )


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _refuse_hidden_masks(module: nn.Module, mask: Any, settings: dict[str, Any]) -> None:
    """Attention whose mask is not to be seen here: pairs would be compared that never attend to each other."""
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
