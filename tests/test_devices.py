"""GPUs that are not here, played on the CPU: one without bfloat16, and Apple's."""

import copy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from test_training import TINY, new_run, same_weights, sentences, step_and_wait, tones, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import utils.loss
from utils import config, ctc, training
from utils.data import ClipDataset
from utils.files import latest_checkpoint
from utils.loss import SingleProcess, validate
from utils.recipes import run_training
from utils.tokenizer import Tokenizer
from utils.training import SCALE_GROWTH, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = dict(augment_strength=0.0, ctc_weight=0.0, splice_share=0.0, use_muon=False)


@pytest.fixture(scope="module")
def clips():
    return ClipDataset(tones(sentences(24)), Tokenizer.for_args(TINY), TINY)


# A GPU without bfloat16: float16, and a loss that is scaled up


@pytest.fixture
def half(monkeypatch):
    """The CPU multiplies matrices in float16, as a T4 does."""
    for module in (utils.loss, training):
        monkeypatch.setattr(module, "matmul_type", lambda device: torch.float16)


def flat_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("native, wanted", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch, native, wanted):
    """A T4 imitates bfloat16, but has no convolution in it: Colab's readers were stuck."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    devices = ("cuda:0", torch.device("cuda"), "cpu", "mps")
    found = [utils.loss.matmul_type(device) for device in devices]
    assert found == [wanted, wanted, torch.float32, torch.float32]


def test_float16_steps_are_those_of_pytorchs_grad_scaler(clips, half):
    """Gradients that float16 would lose are kept; the two overflows at the start move no weight."""
    args = replace(TINY, **PLAIN, max_grad_norm=1e9)
    run, batch = new_run(args, clips), clips.batches()[0]
    run.model.decoder.token_embedding.sparse = False
    start, other = copy.deepcopy(run.model), copy.deepcopy(run.model)
    [optimizer] = training.adamw(other, args)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    run.scale.fill_(2.0**26)
    ready = training.prepare_batch(run, batch, len(run.clips.tokens), 1)
    skipped = 0
    for _ in range(12):
        before = run.scale.item()
        train_step(run, batch)
        skipped += run.scale.item() < before
        optimizer.zero_grad()
        with utils.loss.autocast("cpu"):
            scored = ready.inputs, ready.positions, ready.targets
            loss, _ = utils.loss.summed_cross_entropy(other, other.encoder(ready.mel), *scored)
        scaler.scale(loss / len(ready.targets)).backward()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = run.lr
        scaler.step(optimizer)
        scaler.update()
    assert skipped == 26 - round(torch.tensor(scaler.get_scale()).log2().item()) > 1
    ours, theirs, before = map(flat_weights, (run.model, other, start))
    assert (ours - theirs).norm() < 0.05 * (ours - before).norm(), "other weights than PyTorch's"


@pytest.mark.parametrize("muon", [False, True])
def test_a_gradient_that_overflows_moves_no_weight_and_halves_the_scale(clips, half, muon):
    run, batch = new_run(replace(TINY, use_muon=muon), clips), clips.batches()[0]
    run.scale.fill_(1024.0)
    hook = run.model.decoder.ln.bias.register_hook(lambda gradient: gradient * torch.inf)
    before = copy.deepcopy(run.model.state_dict())
    loss, tokens = step_and_wait(run, batch)
    assert loss / tokens < 10, "the loss is that of the clips"
    assert same_weights(before, run.model.state_dict())
    assert run.scale == pytest.approx(512 * SCALE_GROWTH)
    hook.remove()
    step_and_wait(run, batch)
    assert run.scale == pytest.approx(512 * SCALE_GROWTH**2)
    assert not same_weights(before, run.model.state_dict())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_is_told_from_overflow(clips, half, where):
    run, batch = new_run(TINY, clips), clips.batches()[0]
    if where == "loss":
        run.model.encoder.register_forward_hook(lambda module, mel, states: states * torch.nan)
    else:
        run.model.decoder.ln.bias.register_hook(lambda gradient: gradient * torch.inf)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ValueError, match="at step 0: train again with a lower max_lr"):
        for _ in range(20):
            step_and_wait(run, batch)
    assert run.scale == 65536 / 2 * SCALE_GROWTH if where == "loss" else run.scale <= 1
    assert same_weights(before, run.model.state_dict())


def test_processes_agree_on_an_overflow(clips, half):
    """Gradients are summed first: what overflows in one process skips a step in all."""

    class Overflow(SingleProcess):
        def sum_tensor(self, tensor):
            tensor[3] += torch.inf

    run = new_run(TINY, clips, processes=Overflow())
    before = copy.deepcopy(run.model.state_dict())
    step_and_wait(run, clips.batches()[0])
    assert same_weights(before, run.model.state_dict()) and run.scale < 65536


def test_a_run_in_float16_is_resumed_bit_for_bit(clips, half, tmp_path, monkeypatch):
    args, step = replace(TINY, epochs=2, splice_share=0.0, save_minutes=0), training.train_step
    run_training(args, clips, clips, tmp_path / "whole")

    def power_cut(run, indices):
        if run.step == 7:
            raise SystemError("power cut")
        return step(run, indices)

    monkeypatch.setattr(training, "train_step", power_cut)
    with pytest.raises(SystemError):
        run_training(args, clips, clips, tmp_path / "cut")
    monkeypatch.setattr(training, "train_step", step)
    run_training(args, clips, clips, tmp_path / "cut")
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    scales = [latest_checkpoint(tmp_path / n)[1]["processes"][0]["scale"] for n in ("whole", "cut")]
    assert scales[0] == scales[1] < 65536
    monkeypatch.undo()  # on in float32, where nothing is scaled
    assert len(run_training(replace(args, epochs=3), clips, clips, tmp_path / "cut")) == 3
    assert latest_checkpoint(tmp_path / "cut")[1]["processes"][0]["scale"] == 1


# An Apple GPU


MPS = torch.device("meta")  # in the place of mps, for which PyTorch is not built here
MOVES = ("aten.copy_", "aten._to_copy", "aten.index")  # take tensors of both devices


class AppleTensor(torch.Tensor):
    """A tensor that says it is on another device; its numbers are in a CPU tensor, `held`."""

    @staticmethod
    def __new__(cls, held):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset())
        made = cls._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=MPS, **layout)
        made.held = held
        return made

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with AppleGPU():
            return function(*args, **(kwargs or {}))


class AppleGPU(TorchDispatchMode):
    """Within this block there is a device that lacks what Apple's GPUs lack."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, seen = dict(kwargs or {}), {True: [], False: []}
        wanted = kwargs.get("device")
        if wanted == MPS:
            kwargs["device"] = torch.device("cpu")

        def unwrap(tensor):
            there = isinstance(tensor, AppleTensor)
            assert there or tensor.device != MPS, "made outside of the dispatcher: no numbers"
            seen[there].append(tensor.held if there else tensor)
            return seen[there][-1]

        inner, options = tree_map_only(torch.Tensor, unwrap, (args, kwargs))
        name, result = str(function), function(*inner, **options)
        if wanted != MPS and (wanted is not None or not seen[True]):
            return result
        if any(t.ndim for t in seen[False]) and not name.startswith(MOVES):
            raise RuntimeError(f"{name}: tensors on two devices.")
        wrapped = tree_map_only(torch.Tensor, AppleTensor, result)
        tree_map_only(torch.Tensor, unwrap, wrapped)
        if any(t.dtype in (torch.float64, torch.complex128) for t in seen[True]):
            raise RuntimeError(f"{name}: Apple's GPUs have no float64.")
        if "ctc" in name or any(t.is_sparse for t in seen[True]):
            raise RuntimeError(f"{name}: Apple's GPUs cannot do it.")
        return args[0] if function._schema.is_mutable and result is not None else wrapped


@pytest.fixture
def apple(monkeypatch):
    """What PyTorch does outside of the dispatcher, done in it; and no inference tensors."""
    optimizer = import_module("torch.optim.optimizer")
    tensor, kinds = torch.tensor, optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(
        torch, "tensor", lambda values, device="cpu", **k: tensor(values, **k).to(device)
    )
    monkeypatch.setattr(
        optimizer, "_get_fused_kernels_supported_devices", lambda: [*kinds, MPS.type]
    )
    monkeypatch.setattr(config, "check_device", lambda device: None)  # which refuses "meta"
    greedy = utils.loss.greedy_generate.__wrapped__
    monkeypatch.setattr(utils.loss, "greedy_generate", greedy)


def test_training_on_an_apple_gpu_needs_nothing_that_it_lacks(clips, apple):
    """No float64, no CTC, no sparse gradient, no mixed devices: and the numbers are the CPU's."""
    found = {}
    for device in ("cpu", MPS.type):
        with AppleGPU():
            run = new_run(replace(TINY, device=device, dropout=0.0), clips)
            run.model.decoder.token_embedding.sparse = False
            run.step = 5  # augmentation has begun
            losses = [step_and_wait(run, batch)[0] for batch in clips.batches()[:3]]
            with torch.no_grad():
                scores = validate.__wrapped__(run.model, clips)
                boundaries = ctc.find_boundaries.__wrapped__(run)
        found[device] = losses + [*scores.values(), *sum(boundaries, [])]
    assert run.flat.device == MPS and len(run.optimizers) == 2
    assert found[MPS.type] == pytest.approx(found["cpu"], rel=1e-3)


def test_the_played_gpu_refuses_what_apples_refuse(apple):
    with AppleGPU():
        there = torch.ones(4, 1, 3, device=MPS)
        lengths = torch.tensor([4]), torch.tensor([1])
        for work in (
            lambda: there.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device=MPS),
            lambda: there + torch.ones(3),
            lambda: torch.nn.functional.ctc_loss(
                there, torch.ones(1, 1, device=MPS).long(), *lengths
            ),
        ):
            with pytest.raises(RuntimeError, match="Apple's GPUs|two devices"):
                work()
        assert (there + 1).cpu().sum() == 24


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("available, works, wanted", [(0, 0, "cpu"), (1, 0, "cpu"), (1, 1, "mps")])
def test_an_apple_gpu_is_chosen_where_it_works(monkeypatch, cuda, available, works, wanted):
    """GitHub's virtual Macs have one on which nothing can be allocated."""
    rfft, asked = torch.fft.rfft, []

    def ones(size, device):
        asked.append(device)
        if not works:
            raise RuntimeError("MPS backend out of memory")
        return torch.full((size,), 1.0)

    config._fft_works.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(available))
    monkeypatch.setattr(torch, "ones", ones)
    for _ in range(2):
        assert config.default_device() == ("cuda:0" if cuda else wanted)
    assert asked == ([] if cuda or not available else ["mps"])
    monkeypatch.setattr(torch.fft, "rfft", lambda signal: 0 * rfft(signal))
    config._fft_works.cache_clear()
    assert config.default_device() == ("cuda:0" if cuda else "cpu"), "a wrong result is no result"
