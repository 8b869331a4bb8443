import pytest
import torch

from rnn_longctx.devices import DTYPES, device_name, device_of, dtype_name, dtype_of
from rnn_longctx.errors import InputError


def test_names_and_types_go_both_ways():
    assert list(DTYPES) == ["float32", "bfloat16", "float16", "float64"]
    for name, dtype in DTYPES.items():
        assert dtype_of(name) is dtype_of(dtype) is dtype_of(f"torch.{name}") is dtype and dtype_name(dtype) == name
    with pytest.raises(InputError, match="unknown dtype 'float23'; did you mean \"float32\""):
        dtype_of("float23")


def test_devices():
    assert device_of("cpu") == torch.device("cpu") and device_name(device_of("cpu")) == "cpu"
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="device 'cuda:99' is not available here"):
        device_of("cuda:99")
