"""A griffe extension of `mkdocs.yml`: docstrings as they are written here become pages.

``:func:`name` `` and its kin are links where the site has a page for the name, code where it has none, and a
warning where nothing has the name. A single `Example:` is a section like `Examples:`.
"""

import re

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|mod):`(?:(?P<text>[^<`]+) <)?(?P<name>[\w.]+)>?`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg, **kwargs):
        for obj in _objects(pkg):
            if obj.docstring:
                text = _EXAMPLE.sub("Examples:", obj.docstring.value)
                obj.docstring.value = _ROLE.sub(
                    lambda role, obj=obj: _link(obj, role["name"], role["text"]), text
                )


def _objects(obj):
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _link(obj, name, text):
    target = _find(obj, name)
    if target is None:
        griffe.logger.warning(f"{obj.path}: its docstring links to {name!r}, which does not exist")
        return f"`{text or name}`"
    return f'<autoref identifier="{target}" optional><code>{text or name}</code></autoref>'


def _find(obj, name):
    """The full path of what `name` means in the docstring of `obj`: of its class, its module or the package."""
    first, *rest = name.split(".")
    scope = obj
    while scope is not None:
        found = None
        if scope.is_class or scope.is_module:
            found = scope.all_members.get(first)
        elif scope.name == first:
            found = scope
        if scope.is_package and first == scope.name:
            found = scope
        for part in rest:
            found = found and found.all_members.get(part)
        if found is not None:
            return found.canonical_path
        scope = scope.parent
    return None
