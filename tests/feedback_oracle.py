"""Learned feedback written down once more, densely: one sample and one step at a time, with explicit inverses.

It follows the equations, not the library: no blocks, no scaling, no chosen pairs (its line search is exact). A cell
says, for a step and sample, what the step after it makes of its own lam and hands back: R, the adjoint of the product
W_hh h, and what does not pass the product.
"""

import torch

WHOLE_GRAM = 512
"""Rows of W_hh of a gated cell up to which the Gram matrix of R is used."""


class Elman:
    """h = phi(a), noise in a: R is lam itself, and nothing goes past the product. `slope` is phi'(a), (T, B, H)."""

    gates, gated = 1, False

    def __init__(self, slope):
        self.slope = slope

    def past(self, handed):
        """What is known of dL/dh_t from the step after it, besides g and R B."""
        return torch.zeros_like(handed)

    def around(self, t, b, handed):
        """What of the returns goes past h_t."""
        return 0

    def adjoint(self, t, b, lam, handed):
        """R_t."""
        return lam

    def hands(self, t, b, lam, handed, discount):
        """What step t hands to the step before it."""
        return torch.zeros_like(handed)


class Gru(Elman):
    """h = n + z (h' - n), noise in h: the slope is 1, and z lam goes past the product. Clean values, (T, B, H) each."""

    gates, gated = 3, True

    def __init__(self, r, z, n, q, before):
        super().__init__(torch.ones_like(r))
        self.r, self.z, self.n, self.q, self.before = r, z, n, q, before

    def past(self, handed):
        return handed

    def adjoint(self, t, b, lam, handed):
        r, z, n, q, before = (value[t, b] for value in (self.r, self.z, self.n, self.q, self.before))
        a_n = lam * (1 - z) * (1 - n**2)
        a_z = lam * (before - n) * z * (1 - z)
        a_r = a_n * q * r * (1 - r)
        return torch.cat((a_r, a_z, r * a_n))

    def hands(self, t, b, lam, handed, discount):
        return discount * self.z[t, b] * lam


class Lstm(Elman):
    """c = f c' + i g, h = o tanh(c), noise in h: mu goes past h, along c. Clean values, (T, B, H) each.

    `arriving`: dL/dc_t from outside, (T, B, H); `delta_c`: (T, B, P, H).
    """

    gates, gated = 4, True

    def __init__(self, i, f, g, o, before, c, arriving, delta_c):
        super().__init__(torch.ones_like(i))
        self.i, self.f, self.g, self.o, self.before, self.read = i, f, g, o, before, torch.tanh(c)
        self.arriving, self.delta_c = arriving, delta_c

    def around(self, t, b, handed):
        return self.delta_c[t, b] @ (handed + self.arriving[t, b])

    def kappa(self, t, b, lam, handed):
        return lam * self.o[t, b] * (1 - self.read[t, b] ** 2) + handed + self.arriving[t, b]

    def adjoint(self, t, b, lam, handed):
        i, f, g, o, before = (value[t, b] for value in (self.i, self.f, self.g, self.o, self.before))
        kappa = self.kappa(t, b, lam, handed)
        a_i, a_f, a_g = kappa * g * i * (1 - i), kappa * before * f * (1 - f), kappa * i * (1 - g**2)
        return torch.cat((a_i, a_f, a_g, lam * self.read[t, b] * o * (1 - o)))

    def hands(self, t, b, lam, handed, discount):
        return discount * self.f[t, b] * self.kappa(t, b, lam, handed)


def centred(values, counted):
    """Rows minus the mean of the rows that count; zero for the others."""
    rows = values * counted.view(-1, *[1] * (values.dim() - 1)).to(values.dtype)
    mean = rows.sum(0) / counted.sum()
    return torch.where(counted.view(-1, *[1] * (values.dim() - 1)), rows - mean, 0)


def learned_feedback(
    delta_loss, delta_a, xi, cell, g, matrix, gram, *, lengths, ridge, discount=1.0, baseline=False, finite=None
):
    """Return the adjoint, (T, B, H), and B and A after the update, from B, (G H, H), and A (None before the first)."""
    _, batch, rollouts, units = delta_a.shape
    adjoint, slope, size = torch.zeros_like(g), cell.slope, cell.gates * units
    relation, gram_now = torch.zeros(size, units, dtype=g.dtype), torch.zeros(size, size, dtype=g.dtype)
    slopes, pairs, measured, predicted, gains = torch.zeros(units, dtype=g.dtype), [], 0.0, 0.0, []
    for b in range(batch):
        counted = torch.ones(rollouts, dtype=torch.bool) if finite is None else finite[b]
        back, largest = torch.zeros(rollouts, dtype=g.dtype), 0.0
        after, handed = torch.zeros(size, dtype=g.dtype), torch.zeros(units, dtype=g.dtype)
        for t in range(lengths[b] - 1, -1, -1):
            d, noise, c = delta_a[t, b], xi[t, b], delta_loss[t, b] + back
            d, noise = d * counted.unsqueeze(1), noise * counted.unsqueeze(1)
            around = cell.around(t, b, handed) * counted
            target = c - around
            if baseline:
                d, noise, target = centred(d, counted), centred(noise, counted), centred(target, counted)
            r = ridge * (d * d).sum() / counted.sum()
            inverse = torch.linalg.inv(d @ d.T + r * torch.eye(rollouts, dtype=g.dtype))
            known = slope[t, b] * (after @ matrix)
            own = slope[t, b] * g[t, b] + cell.past(handed)
            prior = own + known
            effect = d @ prior
            gain = float((target @ effect) / (effect @ effect)) if effect.any() else 0.0
            gain = min(max(gain, 0.0), 1.0)
            adjoint[t, b] = gain * prior + d.T @ inverse @ (target - gain * effect)
            if largest:
                weight = 1 / (after @ after + 1e-4 * largest)
                rest = slope[t, b] * (d.T @ inverse @ (target - effect))
                relation += weight * torch.outer(after, rest)
                gram_now += weight * torch.outer(after, after)
                slopes += slope[t, b] ** 2
                fed = d @ known
                measured += weight * (target - effect + fed) @ inverse @ fed
                predicted += weight * fed @ inverse @ fed
                pairs.append((weight, slope[t, b], after, d, inverse))
                gains.append(gain)
            back = discount * (target + around - noise @ adjoint[t, b])
            if baseline:
                back = centred(back, counted)
            after, blind = (cell.adjoint(t, b, lam, handed) for lam in (adjoint[t, b], own))
            handed = cell.hands(t, b, adjoint[t, b], handed, discount)
            largest = max(largest, float(after @ after), float(blind @ blind))
    if not pairs:
        return adjoint, matrix, gram
    ratio = float(measured / predicted) if predicted else None
    return adjoint, *moved(matrix, relation, (gram, gram_now), slopes, pairs, ratio, cell.gated)


def moved(matrix, relation, grams, slopes, pairs, ratio, gated):
    """Return B and A after an update from its sums; `ratio` is that of what was measured to what B predicted."""
    (gram, gram_now), size = grams, len(relation)
    mean, towards = gram, relation
    if not gated or size <= WHOLE_GRAM:
        mean = gram_now if gram is None else 0.9 * gram + 0.1 * gram_now
        system = gram_now + mean
        system = system + 0.3 * system.diagonal().mean() * torch.eye(size, dtype=relation.dtype)
        towards = torch.linalg.inv(system) @ relation
    towards = towards / (slopes / len(pairs) + 0.05)
    bend = 0.0
    for weight, slope_n, after, d, inverse in pairs:
        effect = d @ (slope_n * (after @ towards))
        bend += weight * effect @ inverse @ effect
    if ratio is not None and ratio < 0.5:
        return max(ratio, 0.0) * matrix, mean
    return matrix + 0.7 * (relation * towards).sum() / bend * towards, mean
