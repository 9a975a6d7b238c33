"""Additive quantisation of a matrix: sums of table entries, whose codes are searched and whose tables are fitted in turn.

What is made small is the squared error of the outputs on the calibration's inputs, tr((W - W')H(W - W')ᵀ) with H their Gram matrix.
Rows do not touch each other's errors, so that all of them are searched at once.

Shape suffixes: O outputs (rows), I inputs (columns), N groups of a row, G weights of a group, M tables, K entries of a table, B beams.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.methods.weights.codebooks import CodebookPayload, groups_of, k_means, matrix_of, nearest
from isoflop.methods.weights.healing import Form

EPSILON = 1e-9
"""Of the scale of a row of zeros, as in the released code."""
BETAS = (0.0, 0.95)
"""Of Adam while tables are fitted, as in the released code."""


class Additive(Form):
    """A matrix as codes, tables and a scale for each row.

    Attributes:
        codes_ONM: what the search has chosen.
        tables_MKG, scales_O: what is fitted, and healed.
    """

    codes_ONM: Tensor

    def __init__(self, shape: tuple[int, int], codes_ONM: Tensor, tables_MKG: Tensor, scales_O: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("codes_ONM", codes_ONM)
        self.tables_MKG, self.scales_O = nn.Parameter(tables_MKG), nn.Parameter(scales_O)

    @classmethod
    def begun(cls, weight_OI: Tensor, tables: int, entries: int, group: int, generator: torch.Generator) -> Additive:
        """Rows of norm 1, clustered; what is left is clustered for the next table, and so on."""
        rows, cols = weight_OI.shape
        scales_O = weight_OI.norm(dim=1) + EPSILON
        left_NG = groups_of(weight_OI / scales_O[:, None], group)
        found, codes = [], []
        for _ in range(tables):
            table_KG = k_means(left_NG, entries, generator)
            codes_N = nearest(left_NG, table_KG)
            left_NG = left_NG - table_KG[codes_N]
            found.append(table_KG)
            codes.append(codes_N.view(rows, -1))
        form = cls((rows, cols), torch.stack(codes, -1), torch.stack(found), scales_O)
        return form.to(weight_OI.device)

    @property
    def group(self) -> int:
        """Weights of a group."""
        return self.tables_MKG.shape[2]

    def padded(self) -> Tensor:
        """The matrix with the zeros that fill its last groups."""
        tables, entries = self.tables_MKG.shape[:2]
        first_M = torch.arange(0, tables * entries, entries, device=self.codes_ONM.device)
        flat = F.embedding_bag(self.codes_ONM.flatten(0, 1) + first_M, self.tables_MKG.flatten(0, 1), mode="sum")
        return flat.view(self.shape[0], -1) * self.scales_O[:, None]

    def weight(self) -> Tensor:
        """Scaled sums of entries."""
        return matrix_of(self.padded(), *self.shape)

    def payload(self) -> CodebookPayload:
        """Codes, tables and scales."""
        tables_MKG, scales_O = self.tables_MKG.detach(), self.scales_O.detach()
        return CodebookPayload.of(self.shape, self.codes_ONM.flatten(0, 1), tables_MKG, None, scales_O, self.group)

    def loss(self, weight_OI: Tensor, gram_II: Tensor) -> Tensor:
        """Squared error of the outputs, a mean over them; both are as wide as the padded matrix."""
        apart_OI = self.padded() - weight_OI
        return ((apart_OI @ gram_II) * apart_OI).sum() / len(weight_OI)


def fit(
    form: Additive,
    weight_OI: Tensor,
    gram_II: Tensor,
    *,
    rounds: int,
    steps: int,
    lr: float,
    beam: int,
    tolerance: float,
    generator: torch.Generator | None,
) -> list[float]:
    """Tables and scales by Adam, then codes by beam search, in turn; the loss at the beginning of each round.

    Args:
        steps: of Adam in a round.
        tolerance: rounds end where one has gained less than this share of the loss.
        generator: of the order in which groups and tables are searched; None for their own.
    """
    wide_OI, wide_II = _widened(weight_OI, gram_II, form.group)
    optimizer = torch.optim.Adam([form.tables_MKG, form.scales_O], lr=lr, betas=BETAS, amsgrad=True)
    losses: list[float] = []
    for _ in range(rounds):
        for step in range(steps):
            with torch.enable_grad():
                loss = form.loss(wide_OI, wide_II)
            if step == 0:
                losses.append(float(loss.detach()))
                if len(losses) > 1 and losses[-1] > (1 - tolerance) * min(losses[:-1]):
                    return losses
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        search(form, wide_OI, wide_II, beam, generator)
    return losses


def _widened(weight_OI: Tensor, gram_II: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """With zeros in the columns that fill the last group, whose inputs are never there."""
    more = -weight_OI.shape[1] % group
    return F.pad(weight_OI, (0, more)), F.pad(gram_II, (0, more, 0, more))


@torch.no_grad()
def search(
    form: Additive, weight_OI: Tensor, gram_II: Tensor, beam: int, generator: torch.Generator | None = None
) -> Tensor:
    """Better codes: group by group and table by table, the ``beam`` best of each row so far go on (section 3.2 of the paper).

    A code changed by d moves a row's error by 2 dᵀ(H e) + dᵀH d, where e is what the row lacks; only the group's columns of H are
    read. No search makes a row worse, since what it has may stay.

    Returns:
        the squared errors of the rows (O,), of the codes that the form has now.
    """
    state = _Beams(form, weight_OI, gram_II)
    groups, tables = form.codes_ONM.shape[1:]
    for group in _order(groups, generator):
        for table in _order(tables, generator):
            state.advance(group, table, beam)
    best_O = state.losses_BO.argmin(0)
    rows_O = torch.arange(len(best_O), device=best_O.device)
    form.codes_ONM.copy_(state.codes_BONM[best_O, rows_O])
    return state.losses_BO[best_O, rows_O]


def _order(count: int, generator: torch.Generator | None) -> Sequence[int]:
    return range(count) if generator is None else torch.randperm(count, generator=generator).tolist()


class _Beams:
    """The best encodings of each row so far, what they lack, and their errors."""

    def __init__(self, form: Additive, weight_OI: Tensor, gram_II: Tensor) -> None:
        self._tables_MKG, self._scales_O, self._size = form.tables_MKG, form.scales_O, form.group
        self._gram_II = gram_II
        self.codes_BONM = form.codes_ONM[None].clone()
        self._lacks_BOI = (weight_OI - form.padded())[None]
        self.losses_BO = ((self._lacks_BOI @ gram_II) * self._lacks_BOI).sum(-1)

    def advance(self, group: int, table: int, beam: int) -> None:
        """Choose a code anew, for one group of every row and one table."""
        columns = slice(group * self._size, (group + 1) * self._size)
        table_KG, inner_GG = self._tables_MKG[table], self._gram_II[columns, columns]
        entries = len(table_KG)
        had_BOG = table_KG[self.codes_BONM[:, :, group, table]] * self._scales_O[:, None]
        pull_BOG = self._lacks_BOI @ self._gram_II[:, columns]
        without_BO = self.losses_BO + ((2 * pull_BOG + had_BOG @ inner_GG) * had_BOG).sum(-1)
        pull_BOG = pull_BOG + had_BOG @ inner_GG
        own_K = ((table_KG @ inner_GG) * table_KG).sum(-1)
        scale_O1 = self._scales_O[:, None]
        candidates_BOK = torch.addcmul(scale_O1.square() * own_K, pull_BOG @ table_KG.T, scale_O1, value=-2)
        candidates_BOK += without_BO[..., None]
        found_OC = (
            candidates_BOK.transpose(0, 1).flatten(1).topk(min(beam, candidates_BOK.shape[0] * entries), largest=False)
        )
        self.losses_BO = found_OC.values.T.contiguous()
        source_BO, codes_BO = found_OC.indices.T // entries, found_OC.indices.T % entries
        rows_O = torch.arange(source_BO.shape[1], device=source_BO.device)
        if len(self._lacks_BOI) > 1 or len(source_BO) > 1:
            self._lacks_BOI = self._lacks_BOI[source_BO, rows_O]
            self.codes_BONM = self.codes_BONM[source_BO, rows_O]
        self._lacks_BOI[..., columns] += had_BOG[source_BO, rows_O] - table_KG[codes_BO] * scale_O1
        self.codes_BONM[:, :, group, table] = codes_BO
