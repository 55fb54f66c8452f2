"""What follows what inside a module: read off the instance, by tracing its forward with its children as leaves.

Neither the source of a forward nor its results on random inputs would prove a pattern: the first changes with edits
that do not matter, and the second cannot see that somebody else reads a value. (`torch.fx` takes calls of modules over
while it traces, so no other thread should be running one.)
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from torchao_superblock.bsr.folded_activation import FoldedActivation, activation_name
from torchao_superblock.bsr.linear import LINEAR_TYPES, BSRLinear, has_own_forward
from torchao_superblock.common.modules import HOOKS, has_hooks
from torchao_superblock.common.names import by_class, without_compile_prefix

# Each combination of them is traced, in training mode and out of it.
_MOST_OPTIONAL_ARGUMENTS = 3
# They run nothing themselves.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_REGISTRY = "torchao_superblock.integrations.mlps"


class _Known(NamedTuple):
    method: str
    opened: tuple[str, ...]


_known: dict[type | str, _Known] = {}


def register_mlp(
    cls: type[nn.Module] | str, method: str = "forward", opened: Iterable[str] = ()
) -> None:
    """Say what tracing cannot know about the MLP in modules of exactly this class.

    Args:
        cls: the class, or its qualified name, so that its library need not be imported.
        method: the one that holds the MLP, where the `forward` around it cannot be traced. Nothing else may call the
            layers in it.
        opened: names of children that hold pieces of it and are traced too, not taken as a whole. Nothing else may call
            their pieces.

    Example:
        >>> register_mlp("my_library.Block", method="feed_forward")
        >>> register_mlp("my_library.Layer", opened=("intermediate", "output"))
    """
    _known[cls] = _Known(method, tuple(opened))


class Step(NamedTuple):
    """What a value goes through: a child (or a function that is an attribute), or a function that the code names.

    Attributes:
        path: of the child, as `get_submodule` has it; empty for a function.
        function: that function.
        arguments: what it is given besides the value.
    """

    path: str
    function: Callable | None = None
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()


class Gate(NamedTuple):
    """`activation(gate) * up`, of two linear layers that read the same value, or of the halves of one.

    Attributes:
        gate, up: paths of the layers; the same where one layer computes both.
        activation: path of the activation.
        gate_is_first: whether the gate is the first half, of a single layer.
        chain: what the product alone goes through, up to the next linear layer.
        input: name of the argument that the layers read.
        then: paths of the children that the product goes through, one after the other, up to what the module returns.
            None if it does anything else.
    """

    gate: str
    up: str
    activation: str
    gate_is_first: bool
    chain: tuple[Step, ...]
    input: str
    then: tuple[str, ...] | None


class Traced(NamedTuple):
    """One trace: linear layers with what their output alone goes through, up to the next of them; and gates."""

    chains: dict[str, tuple[Step, ...]]
    gates: dict[str, Gate]


class Dataflow(NamedTuple):
    """What holds whichever optional arguments a module is called with, in training mode and out of it.

    Attributes:
        owner: the module.
        fqn: its own.
        chains, gates: as in :class:`Traced`.
    """

    owner: nn.Module
    fqn: str
    chains: dict[str, tuple[Step, ...]]
    gates: dict[str, Gate]

    def name(self, path: str) -> str:
        """The FQN of a piece."""
        return f"{self.fqn}.{path}" if self.fqn else path

    def piece(self, path: str) -> Any:
        """The child, or the function that is an attribute, at this path."""
        parent, _, name = path.rpartition(".")
        return getattr(self.owner.get_submodule(parent), name)

    def put(self, path: str, module: nn.Module) -> None:
        """Put a module there."""
        parent, _, name = path.rpartition(".")
        setattr(self.owner.get_submodule(parent), name, module)

    def obstacle(self, path: str, places: Counter[nn.Module]) -> str | None:
        """Why others can tell what a piece does, or None: a sentence."""
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            module = self.piece(part)
            if not isinstance(module, nn.Module):
                continue
            if has_hooks(module):
                return f"hooks watch {self.name(part)}"
            if has_own_forward(module):
                return f"{self.name(part)} has a forward of its own"
            # An activation that has several places is replaced in one of them.
            is_linear = isinstance(module, (*LINEAR_TYPES, BSRLinear))
            if (is_linear or end < len(parts)) and places[module] > 1:
                return f"{self.name(part)} has another place in the model"
        return None


def count_places(model: nn.Module) -> Counter[nn.Module]:
    """How many times each module is registered."""
    return Counter(
        child
        for module in model.modules()
        for child in module._modules.values()
        if child is not None
    )


def dataflows(model: nn.Module) -> tuple[list[Dataflow], list[str]]:
    """What follows what, in each module that calls block-sparse layers and may be an MLP.

    Args:
        model: nothing of it is changed or run.

    Returns:
        The dataflows, and a sentence about each module that looks like an MLP and cannot be traced.
    """
    importlib.import_module(_REGISTRY)
    flows, notes = [], []
    for fqn, module in model.named_modules():
        name = without_compile_prefix(fqn)
        known = by_class(_known, _class(module)) or _Known("forward", ())
        layers, others = _pieces(module, known.opened)
        may_fold = any(activation_name(piece) is not None for piece in others)
        is_folded = any(isinstance(piece, FoldedActivation) for piece in others)
        if isinstance(module, _CONTAINERS) or not layers:
            continue
        if not (may_fold or is_folded or len(layers) > 1):
            continue
        try:
            flows.append(Dataflow(module, name, *trace(module, *known)))
        except Untraceable as error:
            if may_fold:
                notes.append(
                    f"{name or 'the model'}: its activation runs on its own and it keeps all its features, since it "
                    f"cannot be seen what follows what in it: {error}"
                )
    return flows, notes


class Untraceable(Exception):
    """A forward cannot be traced; the message says why."""


def trace(module: nn.Module, method: str, opened: tuple[str, ...]) -> Traced:
    """The dataflow of one module; raises :class:`Untraceable`."""
    own = has_own_forward(module) if method == "forward" else method in vars(module)
    if own:
        raise Untraceable(f"it has a {method} of its own")
    function = getattr(_class(module), method, None)
    if function is None:
        raise Untraceable(f"it has no {method}")
    traces = []
    for given, training in itertools.product(_cases(function), (False, True)):
        found: list[Traced] = []
        reasons: list[str] = []
        # What stands for a tensor is none to `isinstance`, or it is: some forwards ask, and one of both must do.
        for tracer in (_Tracer, _TensorTracer):
            try:
                found.append(_trace_once(tracer(method, opened), module, given, training))
            except MemoryError:
                raise
            except Exception as error:
                text = (str(error).splitlines() or [""])[0]
                reasons.append(f"{type(error).__name__}: {text}")
        if not found:
            raise Untraceable(reasons[0])
        traces += found
    chains = {
        path: _common([traced.chains[path] for traced in traces])
        for path in traces[0].chains
        if all(path in traced.chains for traced in traces)
    }
    gates = {
        path: gate
        for path, gate in traces[0].gates.items()
        if all(traced.gates.get(path) == gate for traced in traces)
    }
    return Traced(chains, gates)


def _trace_once(
    tracer: _Tracer, module: nn.Module, given: dict[str, Any], training: bool
) -> Traced:
    stand_in = _stand_in(module, tracer.opened, training)
    before = dict(vars(stand_in))
    # What is drawn while tracing must not be missing afterwards.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        graph = tracer.trace(stand_in, given)
    traced = _read(graph, stand_in)
    after = vars(stand_in)
    if after.keys() != before.keys() or any(after[k] is not v for k, v in before.items()):
        traced.gates.clear()  # a forward that keeps something does more than it returns
    return traced


def _common(chains: list[tuple[Step, ...]]) -> tuple[Step, ...]:
    """What all of them start with."""
    return tuple(
        steps[0]
        for steps in itertools.takewhile(
            lambda steps: all(step == steps[0] for step in steps),
            zip(*chains, strict=False),
        )
    )


def _cases(function: Callable) -> Iterator[dict[str, Any]]:
    """Each way to call it: the optional arguments that are left out, or are flags, with their values."""
    options = []
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable("it takes any number of arguments")
        if isinstance(parameter.default, bool):
            options.append([{name: False}, {name: True}])
        elif parameter.default is not parameter.empty:
            options.append([{name: parameter.default}, {}])
    if len(options) > _MOST_OPTIONAL_ARGUMENTS:
        raise Untraceable(f"it has {len(options)} optional arguments")
    for case in itertools.product(*options):
        yield {name: value for given in case for name, value in given.items()}


class _Tracer(fx.Tracer):
    def __init__(self, method: str, opened: tuple[str, ...]) -> None:
        super().__init__()
        self.traced_func_name = method
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


class _TensorProxy(fx.Proxy):
    """One that `isinstance` takes for a tensor, and for no parameter."""

    _is_param = _is_buffer = False

    @property
    def __class__(self) -> type:
        return Tensor


class _TensorTracer(_Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        # Tensors of the program itself, which it would be taken for, become attributes of the graph.
        return a.node if type(a) is _TensorProxy else super().create_arg(a)


def _pieces(module: nn.Module, opened: tuple[str, ...]) -> tuple[list[BSRLinear], list[Any]]:
    """The block-sparse layers that a module calls itself, and what else it may put between them."""
    layers, others = [], [value for value in vars(module).values() if callable(value)]
    for name, child in module._modules.items():
        if isinstance(child, BSRLinear):
            layers.append(child)
        elif name in opened or isinstance(child, _CONTAINERS):
            inner = _pieces(child, ())
            layers += inner[0]
            others += inner[1]
        elif child is not None:
            others.append(child)
    return layers, others


def _stand_in(module: nn.Module, opened: tuple[str, ...], training: bool) -> nn.Module:
    """A module like this one to trace: what its forward writes to it is lost, and each name has a child of its own."""
    copy = _shallow(module, training)
    for name, child in module._modules.items():
        if isinstance(child, BSRLinear):
            # Some forwards ask a weight for its dtype: a Parameter is part of the graph, a BSRWeight is not.
            child = nn.Linear(child.in_features, child.out_features, child.bias is not None, "meta")
        elif name in opened or isinstance(child, _CONTAINERS):
            child = _stand_in(child, (), training)
        elif child is not None:
            child = _shallow(child, training)
        copy._modules[name] = child
    for name, value in vars(module).items():
        if activation_name(value) is not None:  # a function
            del vars(copy)[name]
            copy._modules[name] = nn.Identity()
    return copy


def _class(module: nn.Module) -> type[nn.Module]:
    """The class whose forward says what a module computes: that before it was fused."""
    return getattr(type(module), "dense_class", type(module))


def _shallow(module: nn.Module, training: bool) -> nn.Module:
    """A module with the same content (and so the same grandchildren), but its own mode, and without hooks."""
    copy = object.__new__(_class(module))
    hooks = {name: type(getattr(module, name))() for name in HOOKS}
    vars(copy).update(vars(module), training=training, **hooks)
    copy._modules = dict(module._modules)
    return copy


def _read(graph: fx.Graph, root: nn.Module) -> Traced:
    """Find chains and gates in a graph."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def is_linear(node: fx.Node) -> bool:
        return (
            node.op == "call_module"
            and isinstance(root.get_submodule(node.target), (*LINEAR_TYPES, BSRLinear))
            and calls[node.target] == 1
            and len(node.args) == 1
            and not node.kwargs
        )

    def step(node: fx.Node, value: fx.Node) -> Step | None:
        """What a node does to a value, if to that alone."""
        arguments, keywords = node.args[1:], dict(node.kwargs)
        inputs: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), inputs.append)
        if inputs != [value] or node.args[0] is not value:
            return None
        if node.op == "call_module":
            alone = not arguments and not keywords and calls[node.target] == 1
            return Step(node.target) if alone else None
        if node.op != "call_function":
            return None
        if node.target is F.dropout:
            # As modules have it: active in training.
            if keywords.pop("training", True) is not root.training:
                return None
        return Step("", node.target, arguments, tuple(sorted(keywords.items())))

    def chain(node: fx.Node) -> Iterator[tuple[Step, fx.Node]]:
        """What the value of a node goes through while it has a single reader."""
        while len(node.users) == 1:
            (reader,) = node.users
            found = step(reader, node)
            if found is None:
                return
            yield found, reader
            node = reader

    def to_next_linear(node: fx.Node) -> Iterator[Step]:
        for found, reader in chain(node):
            yield found
            if is_linear(reader):
                return

    chains = {}
    for node in graph.nodes:
        if is_linear(node):
            chains[node.target] = tuple(to_next_linear(node))

    def gate(product: fx.Node) -> tuple[Gate, list[fx.Node]] | None:
        """What a product is, and the nodes that lead to it."""
        if not _is_call(product, "mul", operator.mul, torch.mul) or product.kwargs:
            return None
        for active, up in (product.args, product.args[::-1]):
            if not isinstance(active, fx.Node) or active.op != "call_module" or not active.args:
                continue
            if step(active, source := active.args[0]) is None:
                continue
            if any(not isinstance(n, fx.Node) or len(n.users) != 1 for n in (active, source, up)):
                continue
            if is_linear(source) and is_linear(up) and source.args == up.args:
                nodes, is_first = [source, up], False
            elif _is_call(source, "", operator.getitem) and _is_call(up, "", operator.getitem):
                halves, (index, other) = source.args[0], (source.args[1], up.args[1])
                if up.args[0] is not halves or {index, other} != {0, 1} or len(halves.users) != 2:
                    continue
                packed = _halved(halves)
                if packed is None or not is_linear(packed) or len(packed.users) != 1:
                    continue
                nodes, is_first = [packed, packed, halves, source, up], index == 0
            else:
                continue
            x = nodes[0].args[0]
            paths = (nodes[0].target, nodes[1].target, active.target)
            steps = tuple(to_next_linear(product))
            return Gate(*paths, is_first, steps, str(x.target), None), [x, *nodes, active, product]
        return None

    gates = {}
    for node in graph.nodes:
        found = gate(node)
        if found is None:
            continue
        one, seen = found
        tail = list(chain(node))
        last = tail[-1][1] if tail else node
        seen += [reader for _, reader in tail]
        returns = [n for n in graph.nodes if n.op == "output" and n.args == (last,)]
        # What nobody reads is a weight that was asked for its dtype.
        others = [
            n for n in graph.nodes if n not in {*seen, *returns} and (n.users or n.op != "get_attr")
        ]
        is_all = seen[0].op == "placeholder" and returns and not others
        if is_all and all(found.path for found, _ in tail):
            one = one._replace(then=tuple(found.path for found, _ in tail))
        gates[one.gate] = one
    return Traced(chains, gates)


def _is_call(node: Any, method: str, *functions: Callable) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target == method
    return node.op == "call_function" and any(node.target is function for function in functions)


def _halved(node: Any) -> fx.Node | None:
    """What `node` is the two halves of, along its features."""
    if not _is_call(node, "chunk", torch.chunk):
        return None
    names = dict(zip(("chunks", "dim"), node.args[1:], strict=False)) | node.kwargs
    return node.args[0] if names == {"chunks": 2, "dim": -1} else None
