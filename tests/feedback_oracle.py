"""Learned feedback written down once more, densely: one sample and one step at a time, with explicit inverses.

It follows the equations, not the library: no blocks, no scaling, no chosen pairs (its line search is exact).
"""

import torch


def centred(values, counted):
    """Rows minus the mean of the rows that count; zero for the others."""
    rows = values * counted.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    mean = rows.sum(0) / counted.sum()
    return torch.where(counted.view(-1, *[1] * (values.dim() - 1)), rows - mean, 0)


def learned_feedback(
    delta_loss, delta_a, xi, slope, g, matrix, gram, *, lengths, ridge, discount=1.0, baseline=False, finite=None
):
    """Return the adjoint, (T, B, H), and B and A after the update, from B, (H, H), and A (None before the first)."""
    _, batch, rollouts, units = delta_a.shape
    adjoint = torch.zeros_like(g)
    relation, gram_now = torch.zeros(units, units, dtype=g.dtype), torch.zeros(units, units, dtype=g.dtype)
    slopes, pairs, measured, predicted, gains = torch.zeros(units, dtype=g.dtype), [], 0.0, 0.0, []
    for b in range(batch):
        counted = torch.ones(rollouts, dtype=torch.bool) if finite is None else finite[b]
        back, largest = torch.zeros(rollouts, dtype=g.dtype), 0.0
        after = torch.zeros(units, dtype=g.dtype)
        for t in range(lengths[b] - 1, -1, -1):
            d, noise, c = delta_a[t, b], xi[t, b], delta_loss[t, b] + back
            d, noise = d * counted.unsqueeze(1), noise * counted.unsqueeze(1)
            if baseline:
                d, noise, c = centred(d, counted), centred(noise, counted), centred(c, counted)
            r = ridge * (d * d).sum() / counted.sum()
            inverse = torch.linalg.inv(d @ d.T + r * torch.eye(rollouts, dtype=g.dtype))
            known = slope[t, b] * (after @ matrix)
            prior = slope[t, b] * g[t, b] + known
            effect = d @ prior
            gain = float((c @ effect) / (effect @ effect)) if effect.any() else 0.0
            gain = min(max(gain, 0.0), 1.0)
            adjoint[t, b] = gain * prior + d.T @ inverse @ (c - gain * effect)
            if largest:
                weight = 1 / (after @ after + 1e-4 * largest)
                rest = slope[t, b] * (d.T @ inverse @ (c - effect))
                relation += weight * torch.outer(after, rest)
                gram_now += weight * torch.outer(after, after)
                slopes += slope[t, b] ** 2
                fed = d @ known
                measured += weight * (c - effect + fed) @ inverse @ fed
                predicted += weight * fed @ inverse @ fed
                pairs.append((weight, slope[t, b], after, d, inverse))
                gains.append(gain)
            back = discount * (c - noise @ adjoint[t, b])
            if baseline:
                back = centred(back, counted)
            after = adjoint[t, b]
            largest = max(largest, float(after @ after), float((slope[t, b] * g[t, b]).square().sum()))
    if not pairs:
        return adjoint, matrix, gram
    mean = gram_now if gram is None else 0.9 * gram + 0.1 * gram_now
    system = gram_now + mean
    system = system + 0.3 * system.diagonal().mean() * torch.eye(units, dtype=g.dtype)
    towards = torch.linalg.inv(system) @ relation / (slopes / len(pairs) + 0.05)
    bend = 0.0
    for weight, slope_n, after, d, inverse in pairs:
        effect = d @ (slope_n * (after @ towards))
        bend += weight * effect @ inverse @ effect
    ratio = float(measured / predicted) if predicted else 1.0
    if predicted and ratio < 0.5:
        return adjoint, max(ratio, 0.0) * matrix, mean
    return adjoint, matrix + 0.7 * (relation * towards).sum() / bend * towards, mean
