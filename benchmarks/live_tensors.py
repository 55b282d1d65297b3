"""How much memory tensors take while something runs: counted, so the same each time. Time is not measured."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that were made inside the block and are alive; what kernels allocate for themselves is not.

    >>> with LiveTensors() as live:
    ...     x = torch.zeros(1000) + 1
    >>> live.peak
    8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), new=False)
        found = func(*args, **(kwargs or {}))
        self._meet(found, new=True)
        return found

    def _meet(self, tree: Any, *, new: bool) -> None:
        for x in tree_leaves(tree):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if new else 0
            if key not in self._known:
                self._known[key] = weakref.ref(storage, self._forget(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        return gone
