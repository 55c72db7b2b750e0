"""Runs training code on dataless tensors: shapes, dtypes and autograd are real, and no kernel computes anything.

Within `Dataless`, operators return tensors that nobody has written to. The operating system gives a page of memory when
it is first written, so such a tensor takes none, whatever its size. PyTorch's fake tensors are asked once what an
operator returns for a combination of shapes, so the second layer of a network costs a look-up. This is several times
faster than fake tensors throughout, and dispatch, autocast and autograd are those of CPU tensors.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
AS_IT_IS = object()  # marks an operator that is run as it is: it touches no data, or returns its input's storage
MAKES_SPARSE = (aten._sparse_coo_tensor_with_dims_and_tensors.default, aten._sparse_coo_tensor_unsafe.default)
CHOOSES = (aten.nonzero.default, aten.masked_select.default, aten.index.Tensor)  # as many as a mask has that are true
DETERMINISTIC: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see


class Dataless(TorchDispatchMode):
    """A mode in which views are real, in-place operators do nothing and all others return new dataless tensors.

    Reading a value (`loss.item()`, Adam's step counter) gives 1, and a GradScaler finds all gradients finite. A sparse
    tensor is made of dataless ones. Raises torch's DataDependentOutputException or DynamicOutputShapeException where a
    shape depends on values, and NotImplementedError for other operators on sparse tensors than those of autograd; each
    names the operator.

    at_most: masks choose all that they can, so that what depends on their values has its largest shape.
    """

    active = 0  # how many of these modes are entered
    _returns: ClassVar[dict[Any, Any]] = {}  # operator -> what _returns says of it
    _known: ClassVar[dict[tuple, Any]] = {}  # operator and what it was called with -> its results; for all predictions

    def __init__(self, at_most: bool = False) -> None:
        super().__init__()
        self._at_most = at_most
        self._fake = FakeTensorMode()
        self._fake.cache_enabled = False  # PyTorch's cache takes longer than it saves, as nothing is asked twice
        self._finite: dict[int, weakref.ref] = {}  # address -> storage of a GradScaler's flag of infinite gradients

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch wraps every call to keep the compiler out, which is off around the tracker already

    def __enter__(self) -> Dataless:
        Dataless.active += 1
        self._fill = DETERMINISTIC.fill_uninitialized_memory
        DETERMINISTIC.fill_uninitialized_memory = False  # it would write to all of the tensors
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Dataless.active -= 1
        DETERMINISTIC.fill_uninitialized_memory = self._fill
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._value(args[0])
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            storage = args[1].untyped_storage()
            self._finite[storage._cdata] = weakref.ref(storage)
        returns = self._returns.get(func)
        if returns is None:
            returns = self._returns[func] = _returns(func)
        if returns is AS_IT_IS:
            return func(*args, **kwargs)
        if None not in returns:  # in place
            same = [args[i] if i < len(args) else kwargs[func._schema.arguments[i].name] for i in returns]
            return tuple(same) if len(same) > 1 else same[0] if same else None
        if func is aten.sparse_mask.default:
            return _masked(*args)
        try:
            key = func, self._at_most and func in CHOOSES, _described(args), _described(tuple(kwargs.items()))
        except SparseError:
            raise NotImplementedError(f"{func} of a sparse tensor can't be run without data") from None
        results = self._known.get(key)
        if results is None:
            results = self._known[key] = self._ask(func, args, kwargs)
        return func(*args, **kwargs) if results is AS_IT_IS else _made(results)

    def _ask(self, func, args: tuple, kwargs: dict) -> Any:
        """Returns the description (of _specified) of what fake tensors say that the operator returns."""
        with self._fake:
            args, kwargs = tree_map(_like, (args, kwargs))
            given: set[int] = set()
            tree_map(lambda x: given.add(x.untyped_storage()._cdata) if isinstance(x, Tensor) else None, (args, kwargs))
            chooses = self._at_most and func in CHOOSES
            out = _all_chosen(func, *args, **kwargs) if chooses else func(*args, **kwargs)
            results = out if isinstance(out, tuple | list) else [out]
            if any(isinstance(x, Tensor) and x.untyped_storage()._cdata in given for x in results):
                return AS_IT_IS
            return _specified(out)

    def _value(self, tensor: Tensor) -> bool | int | float:
        """Returns what reading a dataless scalar gives: 1, and 0 for a GradScaler's flag of infinite gradients."""
        flag = self._finite.get(tensor.untyped_storage()._cdata)
        value = 0.0 if flag and flag() is not None else 1.0
        return value if tensor.dtype.is_floating_point else tensor.dtype is torch.bool or 1


class SparseError(Exception):
    """Means that an operator is called with a sparse tensor."""


def is_dataless(tensor: Tensor) -> bool:
    """Tells whether a tensor has no values to read: within `Dataless`, and while the compiler traces."""
    return Dataless.active > 0 or isinstance(tensor, FakeTensor)


def _returns(func) -> Any:
    """Returns AS_IT_IS for an operator that makes views; else a list with an entry for each result.

    The entry is the position of the argument that the operator returns (in place), or None for a new tensor.
    """
    if func in MAKES_SPARSE:
        return AS_IT_IS
    schema = func._schema
    aliases = [result.alias_info for result in schema.returns]
    if torch.Tag.inplace_view in func.tags or any(alias and not alias.is_write for alias in aliases):
        return AS_IT_IS

    def place(alias) -> int:
        names = (argument.alias_info and argument.alias_info.before_set for argument in schema.arguments)
        return next(i for i, name in enumerate(names) if name == alias.before_set)

    return [place(alias) if alias else None for alias in aliases]


def _described(x: Any) -> Any:
    """Returns a hashable key of an argument: all that an operator's results depend on. 1, 1.0 and True differ."""
    kind = type(x)
    if kind is int or kind is str or x is None:
        return x
    if isinstance(x, Tensor):
        if x.layout is not torch.strided:
            raise SparseError
        return x.shape, x.stride(), x.dtype
    if isinstance(x, tuple | list):
        return tuple([_described(inner) for inner in x])
    return kind, x


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the elements of x [...] at the places of a sparse mask."""
    values = torch.empty_like(mask._values(), dtype=x.dtype)
    return torch.sparse_coo_tensor(mask._indices(), values, mask.shape, check_invariants=False)


def _all_chosen(func, x: Tensor, mask: Any = None) -> Tensor:
    """Returns what an operator of CHOOSES returns where each mask chooses all."""
    if func is aten.nonzero.default:
        return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)
    if func is aten.masked_select.default:
        return x.new_empty(math.prod(torch.broadcast_shapes(x.shape, mask.shape)))
    return func(x, [place for index in mask for place in _places(index)])


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Returns what stands for an index: for a mask of n dimensions, n lists of the places of all its elements."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]


def _like(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x


def _specified(x: Any) -> Any:
    """Describes what an operator returns, for _made to make it again."""
    if isinstance(x, Tensor):
        return "tensor", tuple(x.shape), x.stride(), x.dtype
    if isinstance(x, tuple | list):
        return "several", type(x), [_specified(inner) for inner in x]
    return "value", x


def _made(results: Any) -> Any:
    kind, *rest = results
    if kind == "tensor":
        return torch.empty_strided(rest[0], rest[1], dtype=rest[2])
    return rest[0](map(_made, rest[1])) if kind == "several" else rest[0]
