"""PTX text to a :class:`~.syntax.Kernel`: as much of the language as Triton, LLVM and nvcc write."""

from __future__ import annotations

import itertools
import re

import numpy as np

from .syntax import (
    SINK,
    WIDTH,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Not,
    Pair,
    Parameter,
    PtxError,
    Register,
    Symbol,
    Vector,
)

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(?:loc|file|pragma)\b[^\n]*", re.M)
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?\s*$"
)
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_ARRAY = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[(\d*)\])?\s*;")
# Control may leave behind these, and a thread may have to wait in these.
_ENDS = {"bra", "brx", "ret", "exit", "bar", "barrier", "setmaxnreg"}


class _Scopes:
    """Declared registers by name; inner braces hide outer ones."""

    def __init__(self):
        self.declared = [{}]  # name or prefix -> bytes
        self.known = [{}]  # name -> Register
        self.path = [0]
        self.count = 0
        self.widths, self.names = [], []

    def push(self):
        self.count += 1
        self.path.append(self.count)
        self.declared.append({})
        self.known.append({})

    def pop(self):
        for stack in (self.path, self.declared, self.known):
            stack.pop()

    def declare(self, text):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S).groups()
        for name in names.split(","):
            name = name.strip()
            many = re.match(r"(.*)<\d+>$", name)
            self.declared[-1][many.group(1) + "<" if many else name] = WIDTH[kind]

    def find(self, name):
        """The register called ``name``, or None."""
        for declared, known in zip(reversed(self.declared), reversed(self.known), strict=True):
            if name in known:
                return known[name]
            width = declared.get(name, declared.get(name.rstrip("0123456789") + "<"))
            if width is not None:
                register = known[name] = Register(len(self.widths))
                self.widths.append(width)
                self.names.append(name)
                return register
        return None


def _split(text):
    """Operands, at the commas outside of all brackets."""
    if "{" not in text and "[" not in text:
        return [part for part in map(str.strip, text.split(",")) if part]
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _number(text):
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), True)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return None


def _operand(text, scopes):
    text = text.strip()
    if text[0] == "%" and "|" not in text:  # most are registers
        return scopes.find(text) or Symbol(text)
    if text == "_":
        return SINK
    if text[0] == "{":
        return Vector(tuple(_operand(part, scopes) for part in _split(text[1:-1])))
    if text[0] == "[":
        base, *coordinates = _split(text[1:-1])
        found = re.match(r"([^+]+?)\s*(?:\+\s*(-?\w+))?$", base)
        inner = tuple(_operand(part, scopes) for part in coordinates)
        return Address(_operand(found.group(1), scopes), int(found.group(2) or "0", 0), inner)
    if "|" in text:
        return Pair(*(_operand(part, scopes) for part in text.split("|")))
    if text[0] == "!":
        return Not(_operand(text[1:], scopes))
    return _number(text) or scopes.find(text) or Symbol(text)


def _statements(body):
    """("{" or "}" or "label" or "statement", text, where it begins), in order."""
    at = 0
    while at < len(body):
        if body[at].isspace() or body[at] == ";":
            at += 1
        elif body[at] in "{}":
            yield body[at], "", at
            at += 1
        elif found := _LABEL.match(body, at):
            yield "label", found.group(1), at
            at = found.end()
        else:
            end = body.index(";", at)
            yield "statement", body[at:end].strip(), at
            at = end


def _body(text, start):
    """From behind the opening brace to the closing one."""
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found.group() == "{" else -1
        if not depth:
            return text[start : start + found.start()]
    raise PtxError("the entry does not end")


def _parameters(text):
    for line in filter(None, (line.strip() for line in text.split(","))):
        found = _PARAMETER.search(line)
        if found is None:
            raise PtxError(f"parameter {line!r}")
        kind, name, count = found.groups()
        yield Parameter(name, kind, WIDTH[kind] * int(count or 1))


def _arrays(text, space):
    """(offset of each array of a state space, bytes of all whose size is known); the others come last."""
    places, size, unknown = {}, 0, []
    for kind, alignment, element, name, brackets, count in _ARRAY.findall(text):
        if kind != space or name in places:
            continue
        if brackets == "[]":
            unknown.append(name)
            continue
        size = -(-size // int(alignment or 1)) * int(alignment or 1)
        places[name] = size
        size += WIDTH[element] * int(count or 1)
    size = -(-size // 16) * 16
    return places | dict.fromkeys(unknown, size), size


def _instruction(statement, scopes):
    negated, guard, opcode, rest = _STATEMENT.match(statement).groups()
    instruction = Instruction(opcode, [], None, bool(negated), " ".join(statement.split()))
    instruction.guard = scopes.find(guard) if guard else None
    if opcode.startswith("bra"):
        instruction.operands = [(rest.strip(), tuple(scopes.path))]
    elif opcode == "brx.idx":
        which, table = _split(rest)
        instruction.operands = [_operand(which, scopes), (table, tuple(scopes.path))]
    else:
        instruction.operands = [_operand(part, scopes) for part in _split(rest)]
    return instruction


def _bare(text):
    """Without comments and directives, in as many lines."""
    text = _COMMENT.sub(lambda found: "\n" * found.group().count("\n"), text)
    return _LINE_DIRECTIVE.sub("", text)


def entries(text: str) -> dict[str, str]:
    """Each entry of a module by its name: the text of a module of its own, with what all entries share."""
    text = _bare(text)
    shared, alone, end = [], {}, 0
    for found in _ENTRY.finditer(text):
        shared.append(text[end : found.start()])
        end = found.end() + len(_body(text, found.end())) + 1
        alone[found.group(1)] = text[found.start() : end]
    before = "".join([*shared, text[end:]])
    return {name: before + entry for name, entry in alone.items()}


def parse(text: str) -> Kernel:
    """The one entry of a module.

    Raises:
        PtxError: for what this reader does not know, and for none or several entries.
    """
    text = _bare(text)
    found, *more = _ENTRY.finditer(text) if _ENTRY.search(text) else (None,)
    if found is None or more:
        raise PtxError("several entries" if more else "no entry")
    name, parameters, attributes = found.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", attributes)
    registers = re.search(r"\.maxnreg\s+(\d+)", attributes)
    cluster = re.search(r"\.reqnctapercluster\s+(\d+)((?:\s*,\s*\d+)*)", attributes)
    if cluster and set(re.findall(r"\d+", cluster.group(2))) - {"1"}:
        raise PtxError(f"a cluster along y or z: {cluster.group()}")
    scopes, code, labels, tables = _Scopes(), [], {}, {}
    body = _body(text, found.end())
    line, counted = 1 + text.count("\n", 0, found.end()), 0
    for kind, statement, at in _statements(body):
        line, counted = line + body.count("\n", counted, at), at
        if kind == "{":
            scopes.push()
        elif kind == "}":
            scopes.pop()
        elif kind == "label":
            labels[statement, scopes.path[-1]] = len(code)
            label = statement
        elif statement.startswith(".reg"):
            scopes.declare(statement)
        elif statement.startswith((".shared", ".local")):
            continue  # read by _arrays
        elif statement.startswith(".branchtargets"):  # behind its own label
            tables[label, scopes.path[-1]] = _split(statement.removeprefix(".branchtargets"))
        elif statement.startswith("."):
            raise PtxError(f"directive {statement!r}")
        else:
            code.append(_instruction(statement, scopes))
            code[-1].line = line
    shared, static_shared = _arrays(text, "shared")
    local, local_bytes = _arrays(body, "local")
    return Kernel(
        name,
        list(_parameters(parameters)),
        int(threads.group(1)) if threads else None,
        _blocks(code, labels, tables),
        scopes.widths,
        scopes.names,
        shared,
        static_shared,
        local,
        local_bytes,
        int(cluster.group(1)) if cluster else None,
        int(registers.group(1)) if registers else None,
    )


def _in_scope(places, name, path):
    """What ``places`` has for a label of the innermost of the scopes ``path`` that has it."""
    for scope in reversed(path):
        if (name, scope) in places:
            return places[name, scope]
    raise PtxError(f"no label {name}")


def _blocks(code, labels, tables):
    """Basic blocks, with branches resolved to them."""
    targets = {}  # by instruction: where each of the blocks begins that it may lead to
    for i, instruction in enumerate(code):
        if instruction.parts[0] == "bra":
            targets[i] = [_in_scope(labels, *instruction.operands[0])]
        elif instruction.parts[0] == "brx":
            table, path = instruction.operands.pop()
            targets[i] = [_in_scope(labels, label, path) for label in _in_scope(tables, table, path)]
    reached = itertools.chain(*targets.values())
    starts = {0, *reached, *(i + 1 for i, ins in enumerate(code) if ins.parts[0] in _ENDS)}
    starts = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(starts)}
    for i, places in targets.items():
        leads = [number.get(place, len(starts)) for place in places]
        code[i].target = leads[0] if code[i].parts[0] == "bra" else np.array(leads)
    return [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
