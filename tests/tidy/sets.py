"""Where a set's order could become a decision's: iteration over what one file shows to be a set."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

SET_NAMES = frozenset({"set", "frozenset", "Set", "AbstractSet", "MutableSet"})
SET_METHODS = frozenset({"copy", "difference", "intersection", "symmetric_difference", "union"})
ORDERED_CALLS = frozenset({"deque", "enumerate", "filter", "iter", "list", "map", "tuple", "zip"})
ORDERED_METHODS = frozenset({"chain", "extend", "from_iterable", "fromkeys", "join"})
UNORDERED_CALLS = frozenset({"all", "any", "frozenset", "len", "set", "sorted"})

Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True)
class Known:
    """Names of sets: in this scope, as attributes of anything in this file, as results of its functions."""

    names: frozenset[str]
    attributes: frozenset[str]
    functions: frozenset[str]

    def is_set(self, node: ast.expr) -> bool:
        match node:
            case ast.Set() | ast.SetComp():
                return True
            case ast.Call(func=ast.Name(name)):
                return name in ("set", "frozenset") or name in self.functions
            case ast.Call(func=ast.Attribute(value, method)):
                return method in self.functions or (method in SET_METHODS and self.is_set(value))
            case ast.BinOp(left, ast.BitOr() | ast.BitAnd() | ast.BitXor() | ast.Sub(), right):
                return any(self.is_set(side) or _is_keys(side) for side in (left, right))
            case ast.IfExp(_, body, orelse):
                return self.is_set(body) or self.is_set(orelse)
            case ast.BoolOp(values=values):
                return any(map(self.is_set, values))
            case ast.NamedExpr(_, value):
                return self.is_set(value)
            case ast.Name(name):
                return name in self.names
            case ast.Attribute(attr=name):
                return name in self.attributes
            case _:
                return False


def iterations(tree: ast.Module) -> Iterator[ast.expr]:
    """Every expression that is a set and whose order is looked at."""
    attributes = frozenset(_attributes(tree))
    functions = frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns is not None and _says_set(node.returns)
    )
    yield from _in_scope(tree, Known(frozenset(), attributes, functions))


def _in_scope(scope: Scope, outer: Known) -> Iterator[ast.expr]:
    nodes = list(_own_nodes(scope))
    names = (outer.names - _bound(scope, nodes)) | _set_names(scope, nodes, outer)
    known = Known(names, outer.attributes, outer.functions)
    orderless = {id(node) for node in nodes for node in _orderless(node)}
    for node in nodes:
        if isinstance(node, Scope):
            yield from _in_scope(node, known)
        elif id(node) not in orderless:
            yield from filter(known.is_set, _ordered(node))


def _own_nodes(scope: Scope) -> Iterator[ast.AST]:
    """Nodes of a scope; those of functions inside it belong to them."""
    pending = list(ast.iter_child_nodes(scope))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, Scope):
            pending.extend(ast.iter_child_nodes(node))


def _ordered(node: ast.AST) -> list[ast.expr]:
    """Expressions whose order this node looks at, if they have one."""
    match node:
        case ast.For(iter=source) | ast.AsyncFor(iter=source):
            return [source]
        case ast.ListComp() | ast.DictComp() | ast.GeneratorExp():
            return [generator.iter for generator in node.generators]
        case ast.Call(func=ast.Name(name), args=args) if name in ORDERED_CALLS:
            return args
        case ast.Call(func=ast.Name("min" | "max"), args=args, keywords=keywords):
            return args if any(keyword.arg == "key" for keyword in keywords) else []
        case ast.Call(func=ast.Attribute(value, "pop"), args=[], keywords=[]):
            return [value]
        case ast.Call(func=ast.Attribute(attr=name), args=args) if name in ORDERED_METHODS:
            return args
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [element.value for element in elements if isinstance(element, ast.Starred)]
        case _:
            return []


def _orderless(node: ast.AST) -> list[ast.AST]:
    """Comprehensions whose result forgets the order again."""
    match node:
        case ast.Call(func=ast.Name(name), args=[inner]) if name in UNORDERED_CALLS:
            return [inner] if isinstance(inner, ast.ListComp | ast.GeneratorExp) else []
        case _:
            return []


def _set_names(scope: Scope, nodes: list[ast.AST], outer: Known) -> frozenset[str]:
    """Names that this scope binds to sets and to nothing else."""
    sets = {arg.arg for arg in _arguments(scope) if arg.annotation is not None and _says_set(arg.annotation)}
    others: dict[str, bool] = {}
    for _ in range(2):  # twice, so that a name may be a set because a later line's name is
        known = Known(outer.names | sets, outer.attributes, outer.functions)
        for node in nodes:
            match node:
                case ast.AnnAssign(ast.Name(name), annotation):
                    others[name] = not _says_set(annotation)
                case ast.Assign([ast.Name(name)], value):
                    others[name] = not known.is_set(value)
                case _:
                    continue
            if not others[name]:
                sets.add(name)
    return frozenset(name for name in sets if not others.get(name, False))


def _bound(scope: Scope, nodes: list[ast.AST]) -> set[str]:
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {arg.arg for arg in _arguments(scope)}


def _arguments(scope: Scope) -> list[ast.arg]:
    if isinstance(scope, ast.Module):
        return []
    return [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]


def _attributes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(body=body):
                for statement in body:
                    if isinstance(statement, ast.AnnAssign) and _says_set(statement.annotation):
                        assert isinstance(statement.target, ast.Name)
                        yield statement.target.id
            case ast.AnnAssign(ast.Attribute(attr=name), annotation) if _says_set(annotation):
                yield name
            case ast.Assign([ast.Attribute(attr=name)], ast.Set() | ast.SetComp()):
                yield name
            case ast.Assign([ast.Attribute(attr=name)], ast.Call(ast.Name("set" | "frozenset"))):
                yield name
            case _:
                pass


def _says_set(annotation: ast.expr) -> bool:
    """Is this annotation a set (a union with a set counts, a mapping to sets does not)?"""
    match annotation:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name in SET_NAMES
        case ast.Subscript(value):
            return _says_set(value)
        case ast.BinOp(left, ast.BitOr(), right):
            return _says_set(left) or _says_set(right)
        case _:
            return False


def _is_keys(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="keys" | "items")):
            return True
        case _:
            return False
