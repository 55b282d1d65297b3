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
from hf_distill.inside.features import as_positions, ended_in, passed_on
from hf_distill.inside.layerdrop import RandomState, input_of_stack, layerdrop_of, random_state
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

    def _owner_ended(self, read: Read) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            last = ended_in(output)
            if isinstance(last, Tensor):
                self._seen[read] = last

        return hook

    def _measure_length(self, module: nn.Module, inputs: Any, output: Any) -> None:
        last = ended_in(output)
        self._length = last.shape[1] if isinstance(last, Tensor) else None

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
            self._refuse_cut_graphs()

    def _as_positions(self, read: Read) -> Tensor:
        """A hidden state as `[b t d]`."""
        layer = 0 if read.what == LAST_HIDDEN else read.layer
        features, config = self._blocks.features.get((read.what, layer)), getattr(self._blocks.owner, "config", None)
        return as_positions(self._seen[read], features, config, what=self._named(read))

    def _named(self, read: Read) -> str:
        return f"{read.what} of block {read.layer} of the {self._whose} ({self._blocks.path})"

    def _not_seen(self, read: Read) -> str:
        where = self._named(read)
        if read.what == LAST_HIDDEN and self._called:
            return f"{where}: {type(self._blocks.owner).__name__} returns no last_hidden_state. Use HiddenMatch."
        if not self._called and not self._ran:
            return (
                f"{where}: no block ran. The model that was called is not the {self._whose} that the distiller was "
                "made for (make it with this one, or call distiller.fit)."
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

    def _refuse_cut_graphs(self) -> None:
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

    def _left_out_below(self, read: Read) -> bool:
        """Whether layerdrop left out some block that this was to depend on."""
        last = self._blocks.length - 1 if read.what == LAST_HIDDEN else read.layer
        return layerdrop_of(self._blocks.holder) > 0 and not self._ran.issuperset(range(last + 1))


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
