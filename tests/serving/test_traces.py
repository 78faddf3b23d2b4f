"""Traces in files: what is read back is what was written, under a name that is its content, and nothing else is."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffmas.serving.traces import Layout, TraceStore, cache_salt, check_id, read_trace
from diffmas_ops import KVTrace
from diffmas_ops.states import RecurrentStates


def trace(lengths=(3, 5, 1), dtype=torch.float32, heads=(2, 1), dims=(8, 16), seed=0):
    made = KVTrace.allocate(
        num_layers=len(heads), batch=len(lengths), num_kv_heads=heads, capacity=8, head_dim=dims, dtype=dtype
    )
    generator = torch.Generator().manual_seed(seed)
    for buffer in made.storage.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator).to(dtype))
    made.host_lengths = list(lengths)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip(tmp_path, dtype):
    store, written = TraceStore(tmp_path), trace(dtype=dtype)
    for row, length in enumerate(written.host_lengths):
        stored = store.put(written, row, "model")
        assert stored.length == length
        layout, layers = read_trace(store.path(stored.id), length, Layout.of(written, "model"))
        assert layout == Layout("model", ((2, 8), (1, 16)), dtype)
        for layer, stack in enumerate(layers):
            for found, own in zip(stack, written.storage.layer(layer), strict=True):
                assert torch.equal(found, own[row, :, :length].transpose(0, 1))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_name_is_the_content(tmp_path):
    store, written = TraceStore(tmp_path), trace()
    first = store.put(written, 0, "model")
    assert store.put(trace(), 0, "model") == first
    assert store.put(written, 0, "another model") != first
    assert store.put(trace(dtype=torch.float64), 0, "model") != first
    assert store.put(trace(lengths=(2, 5, 1)), 0, "model") != first
    # What stands behind the row's columns is none of it, every value of them is.
    keys = written.storage.layer(1).keys
    keys[0, :, 3:] += 1
    assert store.put(written, 0, "model") == first
    keys[0, 0, 2, 15] += 1
    assert store.put(written, 0, "model") != first


def test_salt():
    ids = ["0" * 64, "1" * 64]
    assert len({cache_salt(i) for i in ids}) == 2
    assert all(i in cache_salt(i) for i in ids)


@pytest.mark.parametrize("given", ["../" + "a" * 61, "a" * 63, "A" * 64, "a" * 64 + "\n", "", None, 3, "/etc/passwd"])
def test_only_names_are_names(tmp_path, given):
    with pytest.raises(ValueError, match="trace is .*allowed: the 64 hexadecimal digits"):
        check_id(given)
    with pytest.raises(ValueError, match="never a path"):
        TraceStore(tmp_path).path(given)


def test_files_go_with_their_last_row(tmp_path):
    store, written = TraceStore(tmp_path), trace()
    one, same, other = store.put(written, 0, "m"), store.put(written, 0, "m"), store.put(written, 1, "m")
    assert one == same
    used = store.bytes
    store.release(one)
    assert store.path(one.id).is_file() and store.bytes == used
    store.release(same)
    assert not store.path(one.id).exists() and store.path(other.id).is_file()
    store.release(other)
    assert store.bytes == 0 and not list(tmp_path.iterdir())


def test_room(tmp_path):
    written = trace(lengths=(3, 3))
    row = sum(x[0, :, :3].nbytes for layer in range(2) for x in written.storage.layer(layer))
    store = TraceStore(tmp_path, max_bytes=row)
    store.put(written, 0, "m")
    with pytest.raises(ValueError, match=f"max_bytes \\({row}\\)"):
        store.put(written, 1, "m")
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="max_bytes is 0; allowed: integers ≥ 1"):
        TraceStore(tmp_path, max_bytes=0)


def test_what_no_engine_continues(tmp_path):
    written = trace(lengths=(3, 0))
    with pytest.raises(ValueError, match="row 1 of the trace is empty"):
        TraceStore(tmp_path).put(written, 1, "m")
    written.states = RecurrentStates({0: {"state": torch.zeros(2, 1)}})
    with pytest.raises(ValueError, match="recurrent"):
        TraceStore(tmp_path).put(written, 0, "m")


def test_wrong_files(tmp_path):
    store, written = TraceStore(tmp_path), trace()
    stored = store.put(written, 1, "model")
    path, layout = store.path(stored.id), Layout.of(written, "model")
    with pytest.raises(FileNotFoundError, match=f"no trace {'0' * 64}"):
        read_trace(store.path("0" * 64))
    with pytest.raises(ValueError, match="has 5 columns; allowed: 4"):
        read_trace(path, 4, layout)
    for wrong, message in (
        (Layout("another", layout.shapes, layout.dtype), "model is model; allowed: another"),
        (Layout("model", ((1, 8), (1, 16)), layout.dtype), "shapes is "),
        (Layout("model", layout.shapes, torch.float16), "dtype is torch.float32; allowed: torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            read_trace(path, 5, wrong)
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, "keys.0": tensors["keys.0"][:, :1].contiguous()}, path, metadata=metadata)
    with pytest.raises(ValueError, match="keys of layer 0 is .*5, 1, 8"):
        read_trace(path, 5, layout)
    save_file({k: x for k, x in tensors.items() if k != "values.1"}, path, metadata=metadata)
    with pytest.raises(ValueError, match="holds "):
        read_trace(path, 5, layout)
    save_file(tensors, path, metadata={"format": "other"})
    with pytest.raises(ValueError, match="format is 'other'"):
        read_trace(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cannot be read"):
        read_trace(path)
