"""Signs that features or attention have collapsed, which the loss alone does not show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

ROUNDING = 2.0**-8  # spacing of bfloat16 numbers near 1: less is no difference between tokens

# Limits of the alarms, far from what healthy encoders show: on real scans a fresh and a pretrained encoder of
# width 192 had ranks of 56 and 27 % of it and cosines of 0.05 and 0.38; the trained heads' entropies lay
# between 0.62 and 0.83.
LOW_RANK = 0.05  # share of the width
FALL = 3.0  # times smaller than at the last score; a fresh encoder's rank halves as it learns
SAME = 0.99  # mean cosine between tokens
UNIFORM, SINGLE = 0.98, 0.02  # attention entropy


def spread(features: Iterable[Tensor]) -> dict[str, float]:
    """Effective rank, its share of the width, and mean cosine, of features (n_i, D) of several images pooled.

    `rank`: RankMe (Garrido et al. 2023), the exponential of the entropy of the normalised singular values, of
    features around their mean; without that, the large part that all tokens share would hide the rest.
    Singular values that rounding to bfloat16 explains count as 0, so that equal features have rank 0 and not
    that of their rounding errors. `cosine`: mean over all pairs of tokens, 1 where all are alike.
    """
    count, total, gram, directions = 0, None, None, None
    for image in features:
        x = image.double()
        unit = torch.nn.functional.normalize(x, dim=1).sum(0)
        if total is None or gram is None or directions is None:
            total, gram, directions = x.sum(0), x.T @ x, unit
        else:
            total, gram, directions = total + x.sum(0), gram + x.T @ x, directions + unit
        count += len(x)
    if total is None or gram is None or directions is None or count < 2:
        raise ValueError("the spread of fewer than two tokens is not defined")
    mean = total / count
    width = len(mean)
    singular = torch.linalg.eigvalsh(gram - count * mean[:, None] * mean).clamp(min=0).sqrt()
    size = (gram.trace() / (count * width)).sqrt()
    # Largest singular value of count x width independent errors of that size.
    noise = ROUNDING * size * (count**0.5 + width**0.5)
    rank = effective_rank(torch.where(singular > noise, singular, 0.0))
    cosine = float((directions.square().sum() - count) / (count * (count - 1)))
    return {"rank": rank, "rank_share": rank / width, "cosine": cosine}


def effective_rank(singular: Tensor) -> float:
    """Exponential of the entropy of singular values over their sum; 0 where all are 0."""
    total = singular.sum()
    if not bool(total > 0):
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp())


def attention(entropy: Tensor) -> dict[str, float]:
    """Summary of `Encoder.attention_entropy` of several images (images, depth, heads).

    `attention_entropy_min`, `_mean`, `_max` over the heads of all blocks; `attention_entropy_block_min` over
    blocks of the mean of their heads. Images whose attention has no choice (nan) are left out.
    """
    entropy = entropy[entropy.isfinite().flatten(1).all(1)].double()
    if not len(entropy):
        return {}
    head = entropy.mean(0)
    return {
        "attention_entropy_min": float(head.min()),
        "attention_entropy_mean": float(head.mean()),
        "attention_entropy_max": float(head.max()),
        "attention_entropy_block_min": float(head.mean(1).min()),
    }


def alarms(scores: Mapping[str, float], earlier: Sequence[Mapping[str, float]] = ()) -> list[str]:
    """Lines for people, none where all is well.

    scores: figures by name, such as `collapse/rank_share`. earlier: those of the scores before, oldest first.
    Attention that looks at everything alike is where every encoder starts, so it alarms only once some
    earlier score was better.
    """
    lines = []
    share, before = (s.get("collapse/rank_share", 1.0) for s in (scores, earlier[-1] if earlier else {}))
    if share < LOW_RANK:
        lines.append(f"features span {share:.1%} of their width: collapsed to a few directions")
    elif earlier and share * FALL < before:
        lines.append(f"features span {share:.1%} of their width, {before:.1%} at the last score: collapsing?")
    if (cosine := scores.get("collapse/cosine", 0.0)) > SAME:
        lines.append(f"features of all tokens are nearly the same: mean cosine {cosine:.3f}")
    least = [s.get("collapse/attention_entropy_min", 1.0) for s in (*earlier, scores)]
    if least[-1] > UNIFORM and min(least) <= UNIFORM:
        lines.append(f"every head has come to attend to all tokens alike: entropy {least[-1]:.3f} and more")
    if (block := scores.get("collapse/attention_entropy_block_min", 1.0)) < SINGLE:
        lines.append(f"the heads of a block attend to one token each: entropy {block:.3f}")
    return lines
