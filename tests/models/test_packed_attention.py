"""Kernels that are told where each sample begins: the whole route to them on the CPU, where a mask of all pairs stands
in for the kernel. `tests/test_gpu.py` asks the kernels themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import LLM_CONFIGS, make_llm, make_model, make_processor, make_sample
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.models.multimodal import MultimodalLM
from mllm.models.packed import choice, kernels
from mllm.models.packed.boundaries import LENGTHS, SAMPLES, as_mask, boundaries, from_mask, sample_starts
from mllm.models.packed.choice import check_attention, implementation, prove
from mllm.models.packed.function import register
from mllm.train.losses import NextToken, model_inputs
from mllm.types import Batch

CPU, SHAPE = torch.device("cpu"), (3, 28, 28)
FAMILIES = [family for family in LLM_CONFIGS if family != "gemma2"]
register()  # makes the names known


def batches(rows: list[list[int]]) -> Batch:
    """One batch of these rows of samples, which have 0, 1 or 2 images."""
    examples = {n: make_processor()(make_sample(n, n % 3, 1 + n % 2)) for row in rows for n in row}
    return collate([join([examples[n] for n in row], SHAPE) for row in rows], SHAPE)


def summed(model: MultimodalLM, batch: Batch, packed: bool) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of all that trains."""
    objective = NextToken(model.train())
    objective.zero_grad()
    known: Any = {"samples": boundaries(batch["position_ids"])} if packed else {}
    loss = objective(**model_inputs(batch, CPU), **known)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kernel", ["mllm_varlen", "mllm_by_sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_by_boundaries_equals_separate_samples_by_the_familys_own_masks(family: str, kernel: str) -> None:
    ours, own = (make_model(family, name) for name in (kernel, "sdpa"))
    packed_loss, packed = summed(ours, batches([[1, 2, 3], [4, 5]]), packed=True)
    alone = [summed(own, batches([[n]]), packed=False) for n in (1, 2, 3, 4, 5)]
    torch.testing.assert_close(packed_loss, sum(loss for loss, _ in alone), rtol=1e-6, atol=0)
    torch.testing.assert_close(packed, sum(gradient for _, gradient in alone), rtol=1e-4, atol=3e-5)
    prove(ours.llm)


def test_boundaries_decide_what_is_seen_and_transformers_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: told that two samples are one, the same model says something else."""
    model, batch = make_model(attention="mllm_varlen").eval(), batches([[1, 2]])
    inputs: Any = model_inputs(batch, CPU)
    del inputs["labels"]
    one_sample = torch.arange(batch["position_ids"].shape[1])[None]
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: pytest.fail("a mask"))
    with torch.no_grad():
        right, wrong = (model(**inputs, samples=boundaries(p)) for p in (batch["position_ids"], one_sample))
    second = (batch["position_ids"][0] == 0).nonzero()[1]
    torch.testing.assert_close(right[0, :second], wrong[0, :second], rtol=0, atol=1e-5)
    assert not torch.allclose(right[0, second:], wrong[0, second:], atol=1e-3)


def test_a_model_built_for_a_kernel_generates_as_one_built_with_sdpa() -> None:
    ids = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    said = [make_llm("mistral", name).eval().generate(ids, **options) for name in ("mllm_varlen", "sdpa")]
    assert torch.equal(*said)


def row(lengths: list[int], padding: int = 0) -> list[int]:
    return [position for length in lengths for position in range(length)] + [0] * padding


def test_every_sample_lies_between_two_boundaries_and_padding_in_blocks() -> None:
    positions = torch.tensor([row([5, 1, 1, 293]), row([100, 1], 199), row([], 300), row([300])])
    made = boundaries(positions)
    starts = made.starts.tolist()
    padding = [300 * 2 - 199 + 0, 300 * 2 - 199 + 199]
    assert starts[:6] == [0, 5, 6, 7, 300, 400]
    assert {padding[1], 900} <= set(starts), "a row begins a sample"
    assert made.longest == 384
    ends = torch.diff(made.starts.long())
    assert (ends[(made.starts[:-1] >= 402) & (made.starts[:-1] < 900)] <= LENGTHS).all(), "padding is cut"
    assert len(made.starts) % SAMPLES == 1
    assert starts[-1] == positions.numel()
    assert int(sample_starts(positions).sum()) < 20


def test_any_rows_are_cut_where_their_positions_restart() -> None:
    for seed in range(20):
        drawn = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 40, (2, 6), generator=drawn).tolist()
        width = max(map(sum, lengths)) + 3
        positions = torch.tensor([row(own, width - sum(own)) for own in lengths])
        made = boundaries(positions)
        for number, own in enumerate(lengths):
            cuts = [number * width + sum(own[:k]) for k in range(len(own))]
            assert set(cuts) <= set(made.starts.tolist())
            inside = set(range(number * width, number * width + sum(own))) - set(cuts)
            assert not inside & set(made.starts.tolist())


def test_a_mask_of_boundaries_takes_no_memory_and_gives_them_back() -> None:
    made = boundaries(torch.tensor([row([200, 100], 4)]))
    mask = as_mask(made)
    assert mask.shape == (1, 1, 256, SAMPLES + 1)
    assert mask.untyped_storage().nbytes() == made.starts.untyped_storage().nbytes()
    starts, longest = from_mask(mask)
    assert torch.equal(starts, made.starts)
    assert longest == made.longest


def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):  # type: ignore[no-untyped-def]
    """torch 2.10: no scale, no window."""
    assert is_causal
    return kernels.reference(query, key, value, cu_seq_q, max_q, query.shape[-1] ** -0.5, None)


def newer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    """torch 2.11: grouped heads are its own business."""
    assert window_size[1] == 0
    window = None if window_size[0] < 0 else window_size[0] + 1
    return kernels.reference(query, key, value, cu_seq_q, max_q, scale, window)


def newest(query, key, value, starts_q, starts_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
    """torch 2.12: grouped heads are asked for."""
    assert enable_gqa == (key.shape[1] != query.shape[1])
    return newer(query, key, value, starts_q, starts_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("torchs", [old, newer, newest])
def test_every_signature_of_torchs_kernel_is_called_for_the_same_result(
    torchs: Callable[..., Tensor], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = frozenset(inspect.signature(torchs).parameters)
    monkeypatch.setattr(kernels, "varlen_attn", torchs)
    monkeypatch.setattr(kernels, "VARLEN", names)
    drawn = [torch.randn(20, heads, 8, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2)]
    starts = torch.tensor([0, 6, 7, 20, 20], dtype=torch.int32)
    if window and torchs is old:
        monkeypatch.setattr(choice, "VARLEN", names)
        said = choice.obstacles("varlen", make_llm("mistral").config)
        assert any("no sliding window" in words for words in said)
        return
    found = kernels.varlen(*drawn, starts, 13, 0.3, window)
    torch.testing.assert_close(found, kernels.reference(*drawn, starts, 13, 0.3, window))


def test_by_sample_the_model_finds_the_boundaries_itself_and_no_pairs_of_other_samples_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    dense = kernels.scaled_dot_product_attention

    def counted(query: Tensor, *given: Any, **options: Any) -> Tensor:
        sizes.append(query.shape[2])
        return dense(query, *given, **options)

    monkeypatch.setattr(kernels, "scaled_dot_product_attention", counted)
    batch = batches([[1, 2], [3]])
    losses = [summed(make_model(attention="mllm_by_sample"), batch, packed=packed)[0] for packed in (False, True)]
    assert losses[0] == losses[1]
    samples = boundaries(batch["position_ids"]).starts.diff()
    assert sizes == samples[samples > 0].tolist() * 2 * 2  # layers, runs
    assert max(sizes) < batch["input_ids"].shape[1]


def test_on_a_cpu_auto_is_sdpa_and_a_kernel_is_refused_before_the_first_step() -> None:
    llm = make_llm()
    assert implementation("auto", llm.config) == "sdpa"
    assert implementation("auto", make_llm("gemma2", "eager").config) == "eager"  # sdpa leaves its cap out
    for kernel in ("varlen", "flash"):
        with pytest.raises(ValueError, match=rf"model\.attention {kernel}: .*no CUDA device.*set model\.attention"):
            check_attention(kernel, llm, CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"flex cannot train on a CPU"):
        check_attention("flex", llm, CPU)
    check_attention("sdpa", llm, CPU)
    check_attention("by_sample", make_llm("mistral", "mllm_by_sample", head_dim=12), CPU)
    with pytest.raises(ValueError, match=r"by_sample on a cuda: it is for CPUs"):
        check_attention("by_sample", llm, torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a CUDA device says")
@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {}, "more than sdpa computes"),
        ("llama", {"head_dim": 12}, "a head of 12"),
        ("llama", {"attention_dropout": 0.1}, "drops attention out"),
    ],
)
def test_what_no_kernel_can_do_is_told_in_words(family: str, changes: dict[str, Any], said: str) -> None:
    config = make_llm(family, "eager", **changes).config
    assert said in " ".join(choice.obstacles("varlen", config))


def test_a_layer_that_asks_for_more_is_refused_while_it_runs() -> None:
    model, batch = make_model("gemma2", "mllm_varlen"), batches([[1, 2]])
    with pytest.raises(ValueError, match=r"caps its attention scores.*model\.attention"):
        summed(model, batch, packed=True)


def test_a_family_that_hides_its_window_from_kernels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm("mistral", "mllm_varlen")
    prove(llm)
    blind = kernels.reference
    monkeypatch.setattr("mllm.models.packed.function.reference", lambda *given: blind(*given[:-1], None))
    with pytest.raises(ValueError, match=r"attends otherwise"):
        prove(llm)


@pytest.mark.long
@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_flex_sees_in_a_packed_row_what_the_familys_own_masks_show(family: str) -> None:
    """Forward alone: on a CPU torch has no backward pass for it, and its kernel is compiled for each family."""
    batch, own = batches([[1, 2, 3], [4, 5]]), "eager" if family == "gemma2" else "sdpa"
    inputs: Any = model_inputs(batch, CPU)
    del inputs["labels"]
    torch._dynamo.reset()
    with torch.no_grad():
        flex, masks = (make_model(family, name, head_dim=16).eval()(**inputs) for name in ("flex_attention", own))
    real = (batch["input_ids"] != 0)[..., None]
    torch.testing.assert_close(flex * real, masks * real, rtol=0, atol=1e-4)
