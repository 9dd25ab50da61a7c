"""Toy models: random Llamas (and their kin) of a few thousand parameters, saved by transformers and opened by the package."""

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

PTX = os.environ.get("TEST_PTX")  # sm_80 or sm_90: the kernels as compiled for it, on the CPU
SIMULATED = os.environ.get("TEST_GPU") == "simulated" and not (PTX or torch.cuda.is_available())  # a GPU's code without one
if PTX:
    import ptx

    ptx.apply(PTX)
elif not torch.cuda.is_available():  # before Triton is first imported, which transformers does
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        import interpreter_bfloat16
        import interpreter_memory
        import interpreter_speed

        for patch in (interpreter_bfloat16, interpreter_memory, interpreter_speed):
            patch.apply()
        if SIMULATED:
            import simulated_gpu

            simulated_gpu.apply()

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from mtp_model import MTPConfig, load_model  # noqa: E402

torch.set_num_threads(1)

TOY = dict(
    vocab_size=6, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16, max_position_embeddings=2048, initializer_range=0.25, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def save_hf(directory, seed=0, max_shard_size=None, family="llama", **config):
    """A random model of transformers in `directory`; returns it. Norm weights and biases are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TOY | config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    return model


def randomise_adapter(model, seed=1):
    """Random values everywhere in the adapter: B is zero in a fresh one, and masks would then do little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and "weight" in name else 0.3 * noise)
    return model


def batch_indices(n: int, batch: int, step: int, seed: int) -> list[int]:
    """Which examples make batch number `step`: consecutive ones of a stream of shuffled epochs.

    The plain order, which `Batches` gives without packing and buckets, in the obvious way.
    """
    picked, orders = [], {}
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, n)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(n)
        picked.append(int(orders[epoch][offset]))
    return picked


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", metavar="I/N", help="every N-th test, from the I-th on: for several processes without pytest-xdist")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--shard").split("/"))
    items[:] = items[part::parts]


def pytest_configure(config):
    """pytest-xdist would begin with the files of the most tests; some of few tests take longest, and should not come last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture
def device():
    """Where the Triton kernels are tested: on the GPU, or without one in the interpreter or on the machine for PTX, which take tensors on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def make_hf_dir(tmp_path):
    """make_hf_dir(name="model", seed=0, max_shard_size=None, **config) -> directory."""

    def make(name="model", **options):
        save_hf(tmp_path / name, **options)
        return tmp_path / name

    return make


@pytest.fixture
def toy_model(make_hf_dir):
    return load_model(make_hf_dir())


@pytest.fixture
def toy_adapter_model(make_hf_dir):
    """toy_adapter_model(k=8, rank=4, sampler=True, adapter={}, **config) -> a loaded model with a random adapter."""

    def make(k=8, rank=4, sampler=True, name="base", train_masks=False, adapter=(), **config):
        model = load_model(make_hf_dir(name, **config))
        model.add_adapter(MTPConfig(k, rank, alpha=2.0 * rank, sampler=sampler, **dict(adapter)), train_masks=train_masks)
        return randomise_adapter(model)

    return make


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """One base in both forms, and the package's model with a random adapter of 8 masks. Not to be changed by a test."""
    directory = tmp_path_factory.mktemp("shared") / "model"
    hf = save_hf(directory, seed=3)
    model = load_model(directory)
    model.add_adapter(MTPConfig(8, 4))
    return SimpleNamespace(directory=directory, hf=hf, model=randomise_adapter(model))
