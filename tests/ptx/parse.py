"""PTX as text into instructions: what Triton writes for one kernel, and no more of the language than that."""

import re
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """[base + offset]; base a register, a parameter's name or a symbol of shared memory."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    """op: the parts of its name. operands: names and numbers as text, several in braces as a tuple, in brackets as an Address.

    guard: (predicate, the value that lets it run) or None. where: the line of Python that it is of.
    """

    op: tuple[str, ...]
    operands: tuple
    guard: tuple[str, bool] | None
    where: str
    text: str


@dataclass(frozen=True)
class Program:
    """One kernel. params: name -> type, in order. registers: name or prefix -> type; a prefix ends in "<"."""

    name: str
    params: dict[str, str]
    threads: int
    registers: dict[str, str]
    code: list[Instruction]
    labels: dict[str, int]

    def type_of(self, register: str) -> str:
        """Its type as declared: pred, b16, b32, b64 and the like."""
        exact = self.registers.get(register)
        return exact or self.registers[re.sub(r"\d+$", "", register) + "<"]


def number(text: str) -> int | float | None:
    """An immediate's value; None of what is none. 0f and 0d begin the bits of a float."""
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return struct.unpack(">f" if text[1] in "fF" else ">d", bytes.fromhex(text[2:]))[0]
    return None


def float_bits(text: str) -> int:
    """An immediate float's bits, where a register takes them as they are."""
    return int(text[2:], 16)


def _operand(text: str):
    text = text.strip()
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset.strip() or "0", 0))
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    return text


def _split(text: str) -> list[str]:
    """At the commas outside brackets; a destination of two registers, d|p, is two operands."""
    return re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,|\s][^,|]*", text)


def _body(text: str, begin: int) -> str:
    """What stands between the brace at or behind `begin` and the one that closes it."""
    begin = text.index("{", begin)
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[begin + 1 : i]
    raise ValueError("PTX ends inside a kernel")


def parse(ptx: str) -> Program:
    """The one kernel of `ptx`; ValueError of a statement that is not understood."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', ptx, re.M))
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.S)
    params = {name: kind for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", head[2])}
    threads = int(re.search(r"\.reqntid\s+(\d+)", head[3])[1])
    registers, code, labels, where = {}, [], {}, ""
    # directives of a line's place, and labels, end with their line; all else ends with a semicolon
    body = re.sub(r"^(\s*\.(?:loc|file)\b[^\n]*|\s*\$?\w+:)\s*$", r"\1;", _body(text, head.end() - 1), flags=re.M)
    for statement in body.split(";"):
        statement = statement.strip().lstrip("{}").strip()
        if not statement:
            continue
        if statement.endswith(":"):
            labels[statement[:-1]] = len(code)
        elif statement.startswith(".loc"):
            _, number_of_file, line, *_ = statement.split()
            where = f"{files.get(number_of_file, '?')}:{line}"
        elif statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            for name in names.split(","):
                registers[re.sub(r"<\d+>", "<", name.strip())] = kind[1:]
        elif statement.startswith((".pragma", ".file")):
            continue
        else:
            match = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
            if not match:
                raise ValueError(f"{head[1]}: cannot read {statement!r}")
            negated, predicate, op, rest = match.groups()
            guard = (predicate, not negated) if predicate else None
            code.append(Instruction(tuple(op.split(".")), tuple(map(_operand, _split(rest))), guard, where, " ".join(statement.split())))
    return Program(head[1], params, threads, registers, code, labels)
