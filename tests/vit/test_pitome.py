"""PiToMe against loops, what it must conserve and protect, and what it does to the spectrum of a planted graph.

Shape suffixes: B batch, N tokens, T patches, D metric width, C width.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isoflop.core.errors import Infeasible
from isoflop.methods.base import build
from isoflop.methods.vit_tokens.pitome import ENERGIES, VARIANTS, PiToMe, cosines
from isoflop.methods.vit_tokens.probe import VitProbe
from isoflop.methods.vit_tokens.tome import ToMe
from isoflop.models.hooks.vision_blocks import Signals, TokenState


def state_of(x_BNC: Tensor, size_BN1: Tensor | None = None, prefix: int = 1) -> TokenState:
    return TokenState(x_BNC, prefix, torch.arange(len(x_BNC)), size_BN1)


def signals_of(key_BND: Tensor) -> Signals:
    """Signals whose head-mean key is the given one."""
    return Signals(key_BND, key_BND, None, heads=1, scaling=1.0)


def random_state(batch: int, tokens: int, seed: int, sized: bool = True) -> tuple[TokenState, Signals]:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 5, (batch, tokens, 1), generator=generator).float() if sized else None
    x = torch.randn(batch, tokens, 8, generator=generator)
    return state_of(x, size), signals_of(torch.randn(batch, tokens, 6, generator=generator))


def energy_by_loop(key_TD: Tensor, margin: float, alpha: float, energy: str) -> list[float]:
    rows = []
    for a in key_TD.double():
        total = 0.0
        for b in key_TD.double():
            s = float(a @ b / (a.norm() * b.norm()))
            if energy == "gauss":
                deviation = 1 - margin
                total += math.exp(-0.5 * ((1 - s) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
            elif s >= margin:
                total += s if energy == "paper" else s - margin
            else:
                total += alpha * (math.exp(s - margin) - 1)
        rows.append(total / len(key_TD))
    return rows


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize(("margin", "alpha"), [(0.75, 1.0), (0.2, 0.3), (0.0, 0.0)])
def test_energies_equal_a_double_loop(energy: str, margin: float, alpha: float) -> None:
    keys = torch.randn(2, 13, 5, generator=torch.Generator().manual_seed(0))
    energies = PiToMe(energy=energy, alpha=alpha).energies(cosines(keys), margin)
    for key_TD, energy_T in zip(keys, energies, strict=True):
        assert energy_T.tolist() == pytest.approx(energy_by_loop(key_TD, margin, alpha, energy), abs=1e-5)


@given(
    variant=st.sampled_from(VARIANTS),
    patches=st.integers(2, 40),
    share=st.floats(0.0, 1.0),
    layers=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_sizes_and_weighted_sums_are_conserved_after_any_number_of_merges(
    variant: str, patches: int, share: float, layers: int, seed: int
) -> None:
    """Sum of sizes = N, size-weighted sum of tokens conserved, CLS untouched, sources consistent."""
    method = PiToMe(variant=variant)
    state, _ = random_state(2, patches + 1, seed)
    first = state.tracked()
    state = first
    for block in range(layers):
        count = math.floor(share * method.most(state.patches))
        if count == 0:
            continue
        keys = torch.randn(2, state.x_BNC.shape[1], 6, generator=torch.Generator().manual_seed(seed + block))
        before = state.patches
        state = method.reduce(state, signals_of(keys), block, count, layers)
        assert state.patches == before - count
    torch.testing.assert_close(state.sizes().sum(1), first.sizes().sum(1))
    torch.testing.assert_close(
        (state.x_BNC * state.sizes()).sum(1), (first.x_BNC * first.sizes()).sum(1), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(state.x_BNC[:, 0], first.x_BNC[:, 0])
    assert state.source_BNM is not None
    assert torch.equal(state.source_BNM.sum(1), torch.ones_like(state.source_BNM.sum(1))), (
        "each original token is in one"
    )
    from_sources = state.source_BNM @ (first.x_BNC * first.sizes()) / (state.source_BNM @ first.sizes())
    torch.testing.assert_close(state.x_BNC, from_sources, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [PiToMe(variant="paper"), PiToMe(), ToMe()], ids=lambda m: f"{m.name}-{m.knobs()}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_token_is_lost_in_half_precision(method: PiToMe | ToMe, dtype: torch.dtype) -> None:
    """577 tokens in 16 bits, as many merges as there can be in each of 8 blocks: sizes still add up to 577, sources too."""
    generator = torch.Generator().manual_seed(0)
    state = state_of(torch.ones(1, 577, 4, dtype=dtype)).tracked()
    for block in range(8):
        count = method.most(state.patches)
        if count:
            keys = torch.randn(1, state.x_BNC.shape[1], 4, generator=generator).to(dtype)
            state = method.reduce(state, signals_of(keys), block, count, 8)
    assert state.x_BNC.dtype is dtype
    assert float(state.sizes().sum()) == 577
    assert state.source_BNM is not None
    assert torch.equal(state.source_BNM.sum(2, keepdim=True), state.sizes())


@pytest.mark.parametrize("name", ["tome", "pitome"])
@torch.no_grad()
def test_proportional_attention_runs_in_half_precision(name: str) -> None:
    probe = VitProbe(examples=2)
    with build(name, {"macs": 0.6, "prop_attn": True}).apply(probe.model, None):
        wide = probe.outputs(range(2))
        probe.model.module.to(torch.bfloat16)
        found = probe.outputs(range(2))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.float(), wide, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("sized", [False, True])
def test_protected_tokens_come_out_unchanged_and_have_the_lowest_energies(sized: bool) -> None:
    """Every protected token is as before (exactly when sizes are 1), and no mergeable token has less energy."""
    method, count, patches = PiToMe(variant="paper"), 5, 20
    state, signals = random_state(3, patches + 1, 7, sized)
    out = method.reduce(state, signals, 0, count, 4)
    energy_BT = method.energies(cosines(signals.mean_key()[:, 1:]), method.margin0)
    for b in range(3):
        order = energy_BT[b].argsort(descending=True)
        protected, mergeable = order[2 * count :], order[: 2 * count]
        assert energy_BT[b][protected].max() <= energy_BT[b][mergeable].min()
        kept = out.x_BNC[b, 1 : 1 + patches - 2 * count]
        expected = state.x_BNC[b, 1 + protected]
        assert torch.equal(kept, expected) if not sized else torch.allclose(kept, expected, atol=1e-6)


def merged_by_loop(x_NC: Tensor, key_TD: Tensor, energy_T: Tensor, count: int) -> list[Tensor]:
    """Algorithm 1 of the paper on one image whose tokens all have size 1: protected tokens, then the sets' B."""
    order = energy_T.argsort(descending=True).tolist()
    a, b, protected = order[: 2 * count : 2], order[1 : 2 * count : 2], order[2 * count :]
    groups = {j: [x_NC[1 + j]] for j in b}
    for i in a:
        similarity = [float(torch.cosine_similarity(key_TD[i], key_TD[j], dim=0)) for j in b]
        groups[b[int(np.argmax(similarity))]].append(x_NC[1 + i])
    return [x_NC[0], *(x_NC[1 + i] for i in protected), *(torch.stack(groups[j]).mean(0) for j in b)]


def test_a_merge_equals_the_papers_algorithm_written_as_loops() -> None:
    method = PiToMe(variant="paper")
    state, signals = random_state(3, 18, 3, sized=False)
    out = method.reduce(state, signals, 1, 6, 4)
    keys = signals.mean_key()[:, 1:]
    energy_BT = method.energies(cosines(keys), method.margin0 * 0.75)
    for b in range(3):
        expected = torch.stack(merged_by_loop(state.x_BNC[b], keys[b], energy_BT[b], 6))
        torch.testing.assert_close(out.x_BNC[b], expected)


def test_the_margin_falls_to_zero_over_the_blocks() -> None:
    seen: list[float] = []

    class Spy(PiToMe):
        def energies(self, similarity_BTT: Tensor, margin: float) -> Tensor:
            seen.append(margin)
            return super().energies(similarity_BTT, margin)

    state, signals = random_state(1, 9, 0)
    for block in range(4):
        Spy(margin0=0.8).reduce(state, signals, block, 2, 4)
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("layers", [4, 5])
def test_the_release_protects_from_the_second_half_on(layers: int) -> None:
    protected = [PiToMe(variant="released").protects(block, layers) for block in range(layers)]
    assert protected == [block >= math.ceil(layers / 2) for block in range(layers)]
    assert all(PiToMe(variant="paper").protects(block, layers) for block in range(layers))
    assert not any(PiToMe(variant="no_protect").protects(block, layers) for block in range(layers))


def cluster_keys(seed: int, even: bool) -> tuple[Tensor, int]:
    """Keys of 15 near-equal tokens and one that resembles none, with CLS in front; its place among all tokens."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.tensor([1.0, 0, 0, 0]) + 0.05 * torch.randn(1, 17, 4, generator=generator)
    lonely = 2 * int(torch.randint(1, 8, (1,), generator=generator)) + (0 if even else 1)
    keys[0, lonely] = torch.tensor([0.0, 1.0, 0, 0])
    return keys, lonely


@given(seed=st.integers(0, 10**6), count=st.integers(1, 7), even=st.booleans())
@settings(max_examples=40)
def test_an_isolated_token_beside_a_big_cluster_is_never_merged(seed: int, count: int, even: bool) -> None:
    """Under protection, while 2r < T."""
    keys, lonely = cluster_keys(seed, even)
    state = state_of(torch.randn(1, 17, 3)).tracked()
    out = PiToMe(variant="paper").reduce(state, signals_of(keys), 0, count, 4)
    assert out.source_BNM is not None
    row = out.source_BNM[0, :, lonely].argmax()
    assert out.source_BNM[0, row].sum() == 1


def test_tome_can_merge_the_isolated_token() -> None:
    keys, lonely = cluster_keys(0, even=True)
    state = state_of(torch.randn(1, 17, 3)).tracked()
    out = ToMe().reduce(state, signals_of(keys), 0, 8, 4)
    assert out.source_BNM is not None
    row = out.source_BNM[0, :, lonely].argmax()
    assert out.source_BNM[0, row].sum() > 1


def test_ratio_one_is_the_identity_and_below_half_is_rejected() -> None:
    probe = VitProbe(examples=3)
    bare = probe.outputs(range(3))
    with build("pitome", {"ratio": 1.0}).apply(probe.model, None):
        assert torch.equal(probe.outputs(range(3)), bare)
    with pytest.raises(Infeasible, match=r"ratio = 0\.49.*allowed on|ratio = 0\.49.*allowed: 0\.5"):
        build("pitome", {"ratio": 0.49}).check(probe.model.info)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_is_reduced_alike_alone_and_in_a_batch(variant: str) -> None:
    method = PiToMe(variant=variant)
    state, signals = random_state(4, 20, 11)
    together = method.reduce(state, signals, 1, 7, 4)
    for b in range(4):
        alone = TokenState(state.x_BNC[b : b + 1], 1, state.ids_B[b : b + 1], state.sizes()[b : b + 1])
        one = method.reduce(alone, signals_of(signals.k_BNC[b : b + 1]), 1, 7, 4)
        torch.testing.assert_close(one.x_BNC[0], together.x_BNC[b])


def test_random_splits_differ_between_images_and_blocks_only() -> None:
    """The same image splits alike again; another image and another block split otherwise."""
    method = PiToMe(variant="random_split")
    similarity = cosines(torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0)))
    rank = torch.arange(16)[None]

    def gone(example: int, block: int) -> set[int]:
        return set(method.protected(similarity, rank, 6, torch.tensor([example]), block).gone_BR[0].tolist())

    assert gone(3, 1) == gone(3, 1)
    assert len({frozenset(gone(example, 1)) for example in range(8)}) > 4
    assert len({frozenset(gone(3, block)) for block in range(8)}) > 4


def normalised_spectrum(weight_NN: np.ndarray) -> np.ndarray:
    degree = weight_NN.sum(1)
    scaled = weight_NN / np.sqrt(degree[:, None] * degree)
    return np.linalg.eigvalsh(np.eye(len(weight_NN)) - scaled)


def spectral_distance(weight_NN: np.ndarray, source_MN: np.ndarray) -> float:
    """L1 distance of the normalised Laplacian's spectrum to that of the lifted coarse graph.

    Weights between groups are means over their members, and every node gets those of its group.
    """
    mean_MN = source_MN / source_MN.sum(1, keepdims=True)
    lifted_NN = source_MN.T @ (mean_MN @ weight_NN @ mean_MN.T) @ source_MN
    return float(np.abs(normalised_spectrum(weight_NN) - normalised_spectrum(lifted_NN)).sum())


def planted(seed: int) -> Tensor:
    """64 keys in clusters of very different sizes, shuffled, (1, 64, D)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (40, 12, 6, 3, 2, 1)
    centres = torch.nn.functional.normalize(torch.randn(len(sizes), 16, generator=generator), dim=-1)
    keys = centres.repeat_interleave(torch.tensor(sizes), 0)
    keys = keys + 0.08 * torch.randn(keys.shape, generator=generator)
    return keys[torch.randperm(64, generator=generator)][None]


def coarsened(method: PiToMe | ToMe, keys: Tensor, steps: int, count: int) -> np.ndarray:
    """Which of the 64 nodes went into which group after some merges, by the groups' mean keys."""
    state = TokenState(keys, 0, torch.zeros(1, dtype=torch.long)).tracked()
    for _ in range(steps):
        state = method.reduce(state, signals_of(state.x_BNC), 0, count, steps)
    assert state.source_BNM is not None
    return state.source_BNM[0].numpy().astype(np.float64)


def test_protection_preserves_the_spectrum_of_a_planted_graph_better_than_tome() -> None:
    """Clusters of very different sizes, coarsened from 64 to 28 nodes: the paper's spectral claim, on 20 graphs."""
    differences = []
    for seed in range(20):
        keys = planted(seed)
        weight = cosines(keys)[0].double().numpy().clip(min=0.0)
        mine, tomes = (
            spectral_distance(weight, coarsened(method, keys, 3, 12)) for method in (PiToMe(variant="paper"), ToMe())
        )
        differences.append(mine - tomes)
    spread = np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert np.mean(differences) < -2 * spread
