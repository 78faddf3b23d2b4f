"""Values, calls and exceptions between a program and its judge: frames of JSON, everything plain by value.

What has no plain value (functions, iterators, objects of own classes) stays where it is and is named by a number; the
other side holds a :class:`Remote`. Standard library alone; the program's side is sent to it as source.
"""

import base64
import builtins
import collections
import contextlib
import datetime
import decimal
import fractions
import json
import operator
import os
import re
import sys
import traceback
import types
from _thread import RLock

#: Longest frame that is read.
FRAME_BYTES = 64 << 20
#: Values that can be changed, by tag; each is one object of an exchange.
_SHARED = {"list", "dict", "set", "bytearray", "deque", "Counter", "OrderedDict"}
#: Stands for one of them until its parts have been read.
_PENDING = object()
_QUESTION = {"ask", "of", "args", "kwargs"}
_MUTABLE = (list, dict, set, bytearray, collections.deque)
_DTYPE = re.compile(r"[<>|=][biufcSUmM]\d+(\[\d*[A-Za-zμ]+\])?")
_NAMED = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}

OPERATIONS = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "next": next, "iter": iter, "len": len, "bool": bool, "str": str, "repr": repr,
    "get": getattr, "set": setattr, "item": operator.getitem, "setitem": operator.setitem,
    "contains": operator.contains, "eq": operator.eq,
}  # fmt: skip


class Broken(Exception):
    """The other side sent what is not a frame of this protocol, or more than it may."""


class RemoteTraceback(Exception):
    """Where an exception came from, on the other side."""

    def __str__(self):
        return self.args[0]


class Remote:
    """A value that stays on the other side.

    A program may compare a test's objects, as the test's own class does it, and keep them in sets. A test cannot
    compare a program's: they would say themselves what they are equal to, so that is an error.
    """

    __slots__ = ("_peer", "_number", "_kind")

    def __init__(self, peer, number, kind):
        for name, value in (("_peer", peer), ("_number", number), ("_kind", kind)):
            object.__setattr__(self, name, value)

    def _ask(self, operation, *args, **kwargs):
        return self._peer.request(operation, self._number, args, kwargs)

    def __call__(self, *args, **kwargs):
        return self._ask("call", *args, **kwargs)

    def __getattr__(self, name):
        return self._ask("get", name)

    def __setattr__(self, name, value):
        self._ask("set", name, value)

    def __iter__(self):
        return self._ask("iter")

    def __len__(self):
        return self._ask("len")

    def __bool__(self):
        return self._ask("bool")

    def __getitem__(self, key):
        return self._ask("item", key)

    def __setitem__(self, key, value):
        self._ask("setitem", key, value)

    def __contains__(self, value):
        return self._ask("contains", value) if self._peer.compares else self._compare(value)

    def __str__(self):
        return self._ask("str")

    def __repr__(self):
        return self._ask("repr")

    def __eq__(self, other):
        return self is other or (self._ask("eq", other) if self._peer.compares else self._compare(other))

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(self._number) if self._peer.compares else self._compare(None)

    def _compare(self, other):
        raise TypeError(f"an object of type {self._kind} cannot be compared; allowed: values of Python's plain types")

    __lt__ = __le__ = __gt__ = __ge__ = _compare

    def __instancecheck__(self, value):
        raise TypeError(f"a program's own class cannot be asked about; {self._kind} is one")

    __subclasscheck__ = __instancecheck__


class RemoteIterator(Remote):
    __slots__ = ()

    def __iter__(self):
        return self

    def __next__(self):
        return self._ask("next")


class Shared:
    """Containers of one exchange, numbered alike on both sides: what was one object stays one."""

    def __init__(self, objects=()):
        self.objects = [*objects]
        self.numbers = {id(value): n for n, value in enumerate(self.objects)}

    def add(self, value):
        self.numbers[id(value)] = len(self.objects)
        self.objects.append(value)


class Peer:
    """One end of the connection. `serve(operation, value, args, kwargs)` does what the other side asks for."""

    #: Whether what the other side holds may be compared and hashed.
    compares = True

    def __init__(self, read, write, serve):
        self.read, self.write, self.serve = read, write, serve
        self.held, self.numbers, self.remotes = {}, {}, {}
        # Threads of a program may call a test's function; what that asks in turn is served by the same thread.
        self.lock = RLock()

    def request(self, operation, number, args=(), kwargs=None):
        """The answer to one request; requests of the other side are served meanwhile."""
        with self.lock:
            return self._request(operation, number, args, kwargs or {})

    def _request(self, operation, number, args, kwargs):
        shared = Shared()
        self.send({
            "ask": operation, "of": number, "args": [self.encode(a, shared) for a in args],
            "kwargs": {str(k): self.encode(v, shared) for k, v in kwargs.items()},
        })  # fmt: skip
        while True:
            frame = self.receive()
            if frame is None:
                raise EOFError
            if "ask" in frame:
                self.answer(frame)
                continue
            if "error" in frame:
                raise self._exception(frame["error"])
            if "changed" in frame:
                # Encoded one by one, as no list that is itself an object of the exchange.
                changed, objects = frame["changed"], []
                for old, new in zip([*args, *kwargs.values()], changed, strict=False):
                    _merge(old, self.decode(new, objects))
            return self.decode(frame["value"], shared.objects)

    def answer(self, frame):
        """Do what `frame` asks for and send the result, and the arguments where the call has changed them."""
        try:
            objects = []
            args = [self.decode(v, objects) for v in frame["args"]]
            kwargs = {str(k): self.decode(v, objects) for k, v in frame["kwargs"].items()}
            sent = [*args, *kwargs.values()]
            watched = frame["ask"] == "call" and any(isinstance(v, (*_MUTABLE, tuple)) or _numpy(v) for v in sent)
            before = self._encode_all(sent) if watched else None
            value = self.serve(frame["ask"], frame["of"], args, kwargs)
            reply = {"value": self.encode(value, Shared(objects))}
            if watched and (after := self._encode_all(sent)) != before:
                reply["changed"] = after
            data = _pack(reply)
        except Broken:
            raise
        except BaseException as error:
            data = _pack({"error": self._error(error)})
        self.flush()
        with self.lock:
            _write(self.write, data)

    def flush(self):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()

    def send(self, frame):
        _write(self.write, _pack(frame))

    def receive(self):
        """The next frame, a dict; None at the end of the connection."""
        head = _read(self.read, 4)
        if len(head) < 4:
            return None
        size = int.from_bytes(head, "big")
        if size > FRAME_BYTES:
            raise Broken(f"a frame of {size} bytes; allowed: at most {FRAME_BYTES}")
        data = _read(self.read, size)
        if len(data) < size:
            return None
        frame = json.loads(data)
        if type(frame) is not dict or not ("value" in frame or "error" in frame or set(frame) >= _QUESTION):
            raise Broken("a frame that is neither a question nor an answer")
        return frame

    def _encode_all(self, values):
        shared = Shared()
        return [self.encode(v, shared) for v in values]

    def encode(self, value, shared=None):
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        shared = Shared() if shared is None else shared
        if kind is not int and (number := shared.numbers.get(id(value))) is not None:
            return {"again": number}
        if kind is list:
            shared.add(value)
            return [self.encode(v, shared) for v in value]
        if isinstance(value, int):
            value = int.__index__(value)
            return value if abs(value) < 1 << 63 else {"int": hex(value)}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, Remote):
            return {"yours": value._number}
        if kind is type and _NAMED.get(value.__name__) is value:
            return {"type": value.__name__}
        if value is Ellipsis or value is NotImplemented:
            return {"constant": str(value)}
        for base, tag, parts in _PARTS:
            if isinstance(value, base):
                if tag in _SHARED:
                    shared.add(value)
                return {tag: [self.encode(v, shared) for v in parts(value)]}
        if isinstance(value, (bytes, bytearray)):
            if isinstance(value, bytearray):
                shared.add(value)
            return {"bytearray" if isinstance(value, bytearray) else "bytes": base64.b64encode(value).decode()}
        if array := _numpy(value):
            return self._array(array, value, shared)
        if (paths := sys.modules.get("pathlib")) and isinstance(value, paths.PurePath):
            return {"path": [kind.__name__, str(value)]}
        return {"mine": self.hold(value), "kind": kind.__name__, "next": hasattr(kind, "__next__")}

    def _array(self, numpy, value, shared):
        array = numpy.asarray(value)
        scalar = not isinstance(value, numpy.ndarray)
        if not scalar:
            shared.add(value)
        if array.dtype.kind not in "biufcSUmM":
            return {"array": ["O", list(array.shape), [self.encode(v, shared) for v in array.ravel().tolist()], scalar]}
        data = base64.b64encode(array.tobytes()).decode()
        return {"array": [array.dtype.str, list(array.shape), data, scalar]}

    def hold(self, value):
        """The number of a value that stays on this side."""
        number = self.numbers.setdefault(id(value), len(self.held))
        self.held[number] = value
        return number

    def decode(self, data, objects=None):
        """The value; `objects`: those of the exchange so far, which it adds to."""
        return self._decode(data, [] if objects is None else objects)

    def _decode(self, data, objects):
        kind = type(data)
        if kind is list:
            objects.append(found := [])
            found.extend(self._decode(v, objects) for v in data)
            return found
        if kind is not dict:
            return data
        if "mine" in data:
            number = int(data["mine"])
            if number not in self.remotes:
                remote = RemoteIterator if data["next"] else Remote
                self.remotes[number] = remote(self, number, str(data["kind"])[:64])
            return self.remotes[number]
        ((tag, content),) = data.items()
        if tag == "yours":
            return self.held[content]
        if tag == "again":
            if (found := objects[content]) is _PENDING:
                raise Broken("a container in itself")
            return found
        if tag in _SHARED or (tag == "array" and not content[3]):
            place = len(objects)
            objects.append(_PENDING)
            objects[place] = found = self._build(tag, content, objects)
            return found
        return self._build(tag, content, objects)

    def _build(self, tag, content, objects):
        if tag == "array":
            return self._decode_array(*content, objects)
        return _BUILD[tag]([self._decode(v, objects) for v in content] if type(content) is list else content)

    def _decode_array(self, dtype, shape, data, scalar, objects):
        import numpy

        if dtype == "O":
            array = numpy.empty(len(data), object)
            array[:] = [self._decode(v, objects) for v in data]
        elif _DTYPE.fullmatch(dtype):
            array = numpy.frombuffer(base64.b64decode(data), dtype).copy()
        else:
            raise Broken(f"an array of {dtype!r}")
        array = array.reshape(shape)
        return array[()] if scalar else array

    def _error(self, error):
        kind = type(error)
        base = next(k for k in kind.__mro__ if vars(builtins).get(k.__name__) is k)
        try:
            args = [self.encode(a) for a in error.args]
            _pack(args)
        except BaseException:
            args = []
        try:
            text = "".join(traceback.format_exception(kind, error, error.__traceback__, limit=-8))[-4000:]
        except BaseException:
            text = ""
        return [kind.__name__, base.__name__, args, text]

    def _exception(self, content):
        name, base, args, text = content
        base = getattr(builtins, str(base), None)
        if not (isinstance(base, type) and issubclass(base, BaseException)):
            raise Broken("an exception that is none")
        name = str(name)[:64]
        kind = base if name == base.__name__ or not name.isidentifier() else type(name, (base,), {})
        try:
            error = kind(*(self.decode(a) for a in args))
        except (TypeError, ValueError):
            error = type(name, (Exception,), {})(str(args)[:1000])
        error.__cause__ = RemoteTraceback(f"\n{text}") if text else None
        return error


def _numpy(value):
    """numpy, if `value` is an array or a number of it."""
    numpy = sys.modules.get("numpy")
    return numpy if numpy and isinstance(value, (numpy.ndarray, numpy.generic)) else None


def _pairs(value):
    return [list(pair) for pair in dict.items(value)]


#: Types with parts: the first that fits, its tag and its parts.
_PARTS = [
    (collections.Counter, "Counter", _pairs), (collections.OrderedDict, "OrderedDict", _pairs), (dict, "dict", _pairs),
    (tuple, "tuple", tuple.__iter__), (list, "list", list.__iter__), (set, "set", set.__iter__),
    (frozenset, "frozenset", frozenset.__iter__), (collections.deque, "deque", lambda v: [v.maxlen, *v]),
    (range, "range", lambda v: (v.start, v.stop, v.step)), (slice, "slice", lambda v: (v.start, v.stop, v.step)),
    (complex, "complex", lambda v: (v.real, v.imag)), (decimal.Decimal, "Decimal", lambda v: [str(v)]),
    (fractions.Fraction, "Fraction", lambda v: (v.numerator, v.denominator)),
    (datetime.datetime, "datetime", lambda v: [v.isoformat()]), (datetime.date, "date", lambda v: [v.isoformat()]),
    (datetime.time, "time", lambda v: [v.isoformat()]),
    (datetime.timedelta, "timedelta", lambda v: (v.days, v.seconds, v.microseconds)),
    (type({}.keys()), "dict_keys", lambda v: [list(v)]), (type({}.values()), "dict_values", lambda v: [list(v)]),
    (type({}.items()), "dict_items", lambda v: [list(v)]),
]  # fmt: skip
_BUILD = {
    "int": lambda text: int(text, 16), "bytes": base64.b64decode, "bytearray": lambda v: bytearray(base64.b64decode(v)),
    "type": _NAMED.__getitem__, "constant": {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}.__getitem__,
    "Counter": lambda v: collections.Counter(dict(v)), "OrderedDict": collections.OrderedDict, "dict": dict,
    "tuple": tuple, "list": list, "set": set, "frozenset": frozenset,
    "deque": lambda v: collections.deque(v[1:], v[0]), "range": lambda v: range(*v), "slice": lambda v: slice(*v),
    "complex": lambda v: complex(*v), "Decimal": lambda v: decimal.Decimal(*v),
    "Fraction": lambda v: fractions.Fraction(*v), "datetime": lambda v: datetime.datetime.fromisoformat(*v),
    "date": lambda v: datetime.date.fromisoformat(*v), "time": lambda v: datetime.time.fromisoformat(*v),
    "timedelta": lambda v: datetime.timedelta(*v), "path": lambda v: _path(*v),
    "dict_keys": lambda v: dict.fromkeys(v[0]).keys(),
    "dict_values": lambda v: dict(enumerate(v[0])).values(), "dict_items": lambda v: dict(v[0]).items(),
}  # fmt: skip


def _path(name, text):
    import pathlib

    if name not in ("PosixPath", "PurePosixPath", "PureWindowsPath"):
        raise Broken(f"a path of kind {name!r}")
    return getattr(pathlib, name)(text)


def _merge(old, new):
    """`new`, or `old` made equal to it where that was sent by value and can be changed in place."""
    if type(old) is not type(new):
        return new
    if isinstance(old, tuple):
        merged = [_merge(a, b) for a, b in zip(old, new, strict=False)]
        return old if all(map(operator.is_, merged, old)) and len(old) == len(new) else new
    if isinstance(old, (list, collections.deque)):
        merged = [*map(_merge, old, new), *list(new)[len(old) :]]
        old.clear()
        old.extend(merged)
    elif isinstance(old, dict):
        merged = {key: _merge(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        dict.update(old, merged)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif _numpy(old) and getattr(old, "shape", ()) and old.shape == new.shape:
        old[...] = new
    else:
        return new
    return old


def _pack(frame):
    data = json.dumps(frame).encode()
    if len(data) > FRAME_BYTES:
        raise OverflowError(f"a value of {len(data)} bytes; allowed: at most {FRAME_BYTES}")
    return len(data).to_bytes(4, "big") + data


def _write(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd, size):
    data = bytearray()
    while len(data) < size and (more := os.read(fd, min(size - len(data), 1 << 20))):
        data += more
    return bytes(data)


def names(module, wanted):
    """How `module` came by each of the `wanted` names it has: ("module", m), ("from", m) or ("value", the value)."""
    found = {}
    for name in wanted:
        if name in module:
            value = module[name]
            origin = getattr(value, "__module__", None) if isinstance(value, (type, *_FUNCTIONS)) else None
            if isinstance(value, types.ModuleType):
                found[name] = ("module", value.__name__)
            elif origin in sys.stdlib_module_names and getattr(sys.modules.get(origin), name, None) is value:
                found[name] = ("from", origin)
            else:
                found[name] = ("value", value)
    return found


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
