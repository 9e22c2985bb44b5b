"""Tensors that grow along the token axis without copying history at every step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Spare rows taken at each growth, as a share of the rows in use. Growing by 1/64 copies a row
# 64 times in its life, less than attention reads in one long decode step, and wastes 1.6%.
_GROWTH = 64
_GRANULE = 32


def with_room(x: Tensor, capacity: int) -> Tensor:
    """A tensor (batch, heads, capacity, ...) whose first rows are those of x."""
    copy = x.new_empty(*x.shape[:2], capacity, *x.shape[3:])
    copy[:, :, : x.shape[2]] = x
    return copy


class TokenBuffers:
    """Named tensors (batch, heads, capacity, ...) of which the rows [start, end) are in use.

    Slices handed out by `rows` stay valid: rows given up at the end are not written again, the
    tensors are copied instead. Likewise a `copy.copy` shares the tensors until either is appended
    to.
    """

    start: int
    end: int
    tensors: dict[str, Tensor]  # never changed: another dict takes its place
    _written: int  # rows of the tensors that somebody may look at: at least `end`

    def __init__(self) -> None:
        self.pinned = False  # True: memory stays where it is, as a CUDA graph remembers it
        self.clear()

    def __len__(self) -> int:
        return self.end - self.start

    def append(self, rows: dict[str, Tensor], expected: int = 0) -> None:
        """Append tensors (batch, heads, tokens, ...), the same names and shapes every time.

        Args:
            rows: the tensors by name.
            expected: how many rows are to be appended in all, these included, if more follow.
        """
        count = next(iter(rows.values())).shape[2]
        self.reserve(rows, count, expected)
        for name, new in rows.items():
            self.tensors[name][:, :, self.end : self.end + count] = new
        self.extend(count)

    def reserve(self, like: dict[str, Tensor], count: int, expected: int = 0) -> None:
        """Make room for `count` more rows, or `expected` if memory has to be taken anyway.

        Args:
            like: tensors (batch, heads, any, ...) of the names, shapes and dtypes of the rows;
                batch and heads matter only as long as there are none.
            count, expected: rows.
        """
        if not self.has_room(count):
            self.adopt(self.grown(like, max(count, expected)))
        if any(x.is_inference() for x in self.tensors.values()):
            # These cannot be written to outside inference mode.
            self.tensors = {name: x.clone() for name, x in self.tensors.items()}

    def has_room(self, count: int) -> bool:
        """Whether `count` more rows fit behind the last, where nobody has been before."""
        return bool(self.tensors) and count <= self.room

    @property
    def room(self) -> int:
        """Rows that can be taken without new memory."""
        return self.capacity - self.end if self.end == self._written else 0

    def __copy__(self) -> TokenBuffers:
        fork = TokenBuffers()
        fork.tensors, fork.start, fork.end = dict(self.tensors), self.start, self.end
        self._written = fork._written = self.capacity + 1  # both copy before they append
        return fork

    def grown(self, like: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Copies with the rows in use at the front and room for `count` more; see `adopt`."""
        needed = len(self) + count
        capacity = needed + needed // _GROWTH
        return self._copies(like, capacity + -capacity % _GRANULE)

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Take the copies that `grown` made in the place of the tensors."""
        self.tensors = tensors
        self.start, self.end = 0, len(self)
        self._written = self.end

    def extend(self, count: int) -> None:
        """Count `count` rows, written behind the last one, among those in use."""
        self.end += count
        self._written = max(self._written, self.end)

    def _copies(self, like: dict[str, Tensor], capacity: int) -> dict[str, Tensor]:
        if len(self):
            return {name: with_room(x, capacity) for name, x in self.rows(0, len(self)).items()}
        return {name: x.new_empty(*x.shape[:2], capacity, *x.shape[3:]) for name, x in like.items()}

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """Views of the rows [start, end), counted from the first row in use."""
        return {
            name: tensor[:, :, self.start + start : self.start + end]
            for name, tensor in self.tensors.items()
        }

    def crop(self, count: int) -> None:
        """Give up the last `count` rows."""
        self.end -= count
        self._shrink()

    def drop_front(self, count: int, shrink: bool = True) -> None:
        """Give up the first `count` rows; their space is reused at the next growth.

        Args:
            count: rows.
            shrink: False leaves the memory as it is, where something else refers to it.
        """
        self.start += count
        if count and shrink:
            self._shrink()

    def _shrink(self) -> None:
        """Free the space of rows given up, once it is a good part of the whole."""
        if self.pinned:
            return
        if not len(self):
            self.clear()
        elif self.capacity - len(self) > len(self) // 4 + 2 * _GRANULE:
            self.adopt(self._copies(self.tensors, len(self)))

    def clear(self) -> None:
        """Give up everything."""
        self.tensors = {}
        self.start = self.end = self._written = 0

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `fn` of it (a batch selection, a move to a device)."""
        self.tensors = {name: fn(tensor) for name, tensor in self.tensors.items()}

    @property
    def capacity(self) -> int:
        """Rows that fit in the memory taken, rows given up at the front included."""
        return next(iter(self.tensors.values())).shape[2] if self.tensors else 0

    def nbytes(self) -> dict[str, int]:
        """Bytes in use by name, and under "spare" those of the rows not in use."""
        capacity = max(self.capacity, 1)
        used = {n: t.nbytes // capacity * len(self) for n, t in self.tensors.items()}
        total = sum(t.nbytes for t in self.tensors.values())
        return used | {"spare": total - sum(used.values())}
