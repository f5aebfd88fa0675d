"""The posterior of two laws, their misfit and their noise, given the runs: draws that carry all of it together.

Hyperparameters are integrated by adaptive importance sampling; the law's parameters, made linear about the mode of each
model, are integrated in closed form inside. A model is a tie (what the families share) with a density of the noise
(normal, or Huber's with its straight tails); draws take a model by its weight in the evidence, then hyperparameters,
parameters and a misfit function, and are at last weighted for the curvature of the law that the linear form left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import logsumexp, ndtr, ndtri, softmax
from scipy.stats import qmc

from scaling.ensemble.discrepancy import CELL, LATENTS, RUN, TRUNK, Basis, Nearness, Points, physical
from scaling.laws.base import Law

TIED_SD = 1e-4  # prior sd of a difference that is held at zero
TEMPERS = (0.3, 0.6, 1.0)  # powers of the likelihood on the way from the prior to the posterior
SAMPLES = 128  # hyperparameters, a power of two; of the prior's Sobol sequence first, then about what was found
HUBER_KINK = 1.345  # in standard deviations: 95 % efficient under normal noise (Huber 1981, section 4.5)
LAD_KINK = 0.2  # small enough that every residual lies in the straight part
NOISES = {"auto": ("normal", "huber"), "log-ls": ("normal",), "raw-ls": ("raw",), "huber": ("huber",), "lad": ("lad",)}
MODE_STEPS, REWEIGHTS = 30, 3


@dataclass(frozen=True)
class Rows:
    """What an ensemble sees of n runs: y log loss; family (0 or 1); trunk and cell numbers, -1 for a run that shares
    none; x (n, d) decades from the middle of the ladder; features (inputs, n) of the law; count: runs that a row is the
    mean of."""

    y: np.ndarray
    family: np.ndarray
    trunk: np.ndarray
    cell: np.ndarray
    x: np.ndarray
    features: np.ndarray
    count: np.ndarray

    @property
    def points(self) -> Points:
        return Points(self.x, self.family)

    @cached_property
    def near(self) -> Nearness:
        return Nearness.between(self.points, self.points)


@dataclass(frozen=True)
class Draws:
    """K draws: theta (K, families, P) centred parameters; h (K, 7) hyperparameters; weights (K, features) of the misfit
    in `bases[base[k]]`; tie, noise (K,) model numbers; tail (K,) factor by which one run's noise is scaled."""

    theta: np.ndarray
    h: np.ndarray
    base: np.ndarray
    bases: tuple[Basis, ...]
    weights: np.ndarray
    tie: np.ndarray
    noise: np.ndarray
    tail: np.ndarray

    def part(self, picked: np.ndarray) -> Draws:
        """Some of the draws, by their numbers."""
        every = ("theta", "h", "base", "weights", "tie", "noise", "tail")
        return replace(self, **{name: getattr(self, name)[picked] for name in every})

    def misfit(self, points: Points) -> np.ndarray:
        """(K, m) each draw's misfit at the points."""
        out = np.empty((len(self.theta), len(points.x)))
        for k, basis in enumerate(self.bases):
            rows = self.base == k
            out[rows] = basis.values(self.weights[rows], points)
        return out

    def misfit_each(self, x: np.ndarray) -> np.ndarray:
        """(K,) misfit of the first family, each draw's at a point of its own; x (K, d)."""
        out = np.empty(len(self.theta))
        for k, basis in enumerate(self.bases):
            rows = self.base == k
            common, own = basis.parts
            first, second = np.split(self.weights[rows], 1 + basis.families, axis=1)[:2]
            out[rows] = ((common * first + own * second) * basis.block(x[rows])).sum(-1)
        return out


@dataclass(frozen=True)
class Posterior:
    """Everything that draws are made from: hyperparameters h (H, 7) with log weights score (H, ties, noises), the mode
    of every model phi (ties, noises, Q), and the scales of the rows' noise (noises, n)."""

    rows: Rows
    law: Law
    ties: tuple[tuple[str, ...], ...]
    noises: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    h: np.ndarray
    score: np.ndarray
    phi: np.ndarray
    scale: np.ndarray

    @property
    def families(self) -> int:
        return 2 if len(self.mean) > len(self.law.names) else 1

    # ------------------------------------------------------------------ the law in the coordinates of the ensemble

    def split(self, phi: np.ndarray) -> np.ndarray:
        """(K, families, P) parameters of the law: half a difference to either side of the mean, exponents as such."""
        # The coordinates are the mean of the two families and their difference, not the two themselves: the prior of
        # the difference is narrow (both read the same text), that of the mean is wide, and in these coordinates the
        # two are independent. A tie is the same model with a difference of nearly no width.
        size = len(self.law.names)
        own = phi[:, None, :size]
        if self.families == 2:
            half = phi[:, None, size:] / 2
            own = np.concatenate([own - half, own + half], axis=1)
        return np.where(self.law.logged, np.exp(np.where(self.law.logged, own, 0)), own)

    def law_of(self, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K, n) log loss and (K, n, Q) its derivatives."""
        theta, rows, size = self.split(phi), self.rows, len(self.law.names)
        value, jacobian = np.empty((len(phi), len(rows.y))), np.zeros((len(phi), len(rows.y), phi.shape[1]))
        for f in range(self.families):
            own = np.flatnonzero(rows.family == f)
            value[:, own], slope = self.law.value_jacobian(theta[:, f], rows.features[:, own])
            slope = np.swapaxes(slope * np.where(self.law.logged, theta[:, f], 1.0)[:, :, None], 1, 2)
            jacobian[:, own, :size] = slope
            if self.families == 2:
                jacobian[:, own, size:] = (f - 0.5) * slope
        return value, jacobian

    # ------------------------------------------------------------------ noise and misfit of the rows

    def covariance(self, h: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """(H, n, n) covariance of the rows about their laws; scale (n,) multiplies a run's standard deviation."""
        # Four things make two rows err alike: the misfit of the law where they lie near each other, the trunk that
        # both branch off, the cell that two families match in, and, on the diagonal only, a run's own noise. Number
        # -1 is no group: it must not match itself.
        rows, h_ = self.rows, h[:, :, None, None]
        trunk, cell = ((x[:, None] == x) * (x >= 0.0) for x in (rows.trunk, rows.cell))
        out = rows.near.covariance(h)
        out += h_[:, TRUNK] ** 2 * trunk + h_[:, CELL] ** 2 * cell
        return out + (h[:, RUN, None] * scale / np.sqrt(rows.count))[:, :, None] ** 2 * np.eye(len(rows.y))

    def whiten(self, h: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inverse Cholesky factors (H, n, n) of the covariance, and its log determinants (H,)."""
        # With C = L L', the rows L^-1 r of a residual r are independent with variance one, so that all that follows
        # is ordinary least squares; log det C is twice the sum of the logarithms of L's diagonal.
        root = np.linalg.cholesky(self.covariance(h, scale))
        eye = np.broadcast_to(np.eye(root.shape[-1]), root.shape)
        return np.linalg.solve(root, eye), 2 * np.log(np.diagonal(root, axis1=1, axis2=2)).sum(-1)

    # ------------------------------------------------------------------ evidence

    def modes(self, h: np.ndarray, start: np.ndarray) -> np.ndarray:
        """(ties, noises, Q) most probable parameters of every model at one vector of hyperparameters (7,)."""
        # One white matrix for each density of the noise, shared by all ties: the search runs for all models at once,
        # and the cost is that of matrix products over a leading axis.
        shape = start.shape
        white = np.concatenate([self.whiten(h[None], s)[0] for s in self.scale])
        white = np.broadcast_to(white[None], (shape[0], *white.shape)).reshape(-1, *white.shape[1:])
        sd = np.repeat(self.sd, shape[1], axis=0)
        return damped_newton(self, white, sd, start.reshape(-1, shape[-1])).reshape(shape)

    def evidence(self, white: tuple[np.ndarray, np.ndarray], tie: int, phi: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of one model made linear at phi (Q,): log likelihood (H,) with its parameters integrated out, their mean
        (H, Q) and precision (H, Q, Q)."""
        value, jacobian = (x[0] for x in self.law_of(phi[None]))
        residual = self.rows.y - value + jacobian @ (phi - self.mean)
        # With a prior N(mean, sd^2) and residual = J (phi - mean) + noise, the parameters integrate out in closed form
        # (Rasmussen & Williams 2006, eq. 2.43): the evidence is the squared whitened residual less what the best
        # parameters explain of it, and the determinants charge for the freedom to do so.
        both = white[0] @ np.column_stack([jacobian, residual])
        j, r = both[..., :-1], both[..., -1:]
        sd = self.sd[tie]
        precision, b = j.transpose(0, 2, 1) @ j + np.diag(1 / sd**2), j.transpose(0, 2, 1) @ r
        mean = np.linalg.solve(precision, b)
        determinant = white[1] + np.linalg.slogdet(precision)[1] + 2 * np.log(sd).sum()
        log_likelihood = -0.5 * (determinant + ((r**2).sum(1) - (b * mean).sum(1))[:, 0])
        return log_likelihood, self.mean + mean[..., 0], precision

    def scored(self, h: np.ndarray) -> np.ndarray:
        """(H, ties, noises) log evidence, with what each density of the noise adds for the scales it gave the rows."""
        # The Cholesky factors are the dear part and depend on the hyperparameters and the noise alone; every tie
        # reuses them.
        out = np.empty((len(h), len(self.ties), len(self.noises)))
        for n, (noise, scale) in enumerate(zip(self.noises, self.scale, strict=True)):
            white = self.whiten(h, scale)
            for t in range(len(self.ties)):
                out[:, t, n] = self.evidence(white, t, self.phi[t, n])[0] + density_gain(noise, scale)
        return out

    def reweighted(self, h: np.ndarray) -> Posterior:
        """With the scales that each density of the noise gives the rows, by their leave-one-out residuals under the
        untied model at hyperparameters h (7,)."""
        scale = self.scale.copy()
        for n, noise in enumerate(self.noises):
            if noise in ("huber", "lad"):
                residual = self.rows.y - self.law_of(self.phi[0, n][None])[0][0]
                for _ in range(REWEIGHTS):
                    # A run's residual about a prediction from all others is (C^-1 r)_i / (C^-1)_ii with variance
                    # 1 / (C^-1)_ii (Rasmussen & Williams 2006, eq. 5.12): a spoilt run cannot hide by pulling the fit.
                    inverse = np.linalg.inv(self.covariance(h[None], scale[n])[0])
                    left_out = (inverse @ residual) / np.sqrt(np.diag(inverse))  # standard normal if all is as assumed
                    scale[n] = np.sqrt(np.maximum(np.abs(left_out * scale[n]) / kink(noise), 1.0))
        return replace(self, scale=scale)

    # ------------------------------------------------------------------ draws

    def draws(self, count: int, rng: np.random.Generator, only: np.ndarray | None = None) -> Draws:
        """`count` draws; `only` (ties,) leaves out models, as a mask of ties."""
        # A draw first takes hyperparameters, tie and noise together by their weight. Systematic resampling spends one
        # random number on all draws, so that a model with weight 0.3 gets 30 % of them to within one.
        score = self.score if only is None else np.where(only[None, :, None], self.score, -np.inf)
        weight = softmax(score)
        hyper, tie, noise = np.unravel_index(np.sort(systematic(weight.ravel(), count, rng)), weight.shape)
        phi, log_weight = np.empty((count, len(self.mean))), np.zeros(count)
        groups = []
        for n in np.unique(noise):
            used = np.unique(hyper[noise == n])
            factor = self.whiten(self.h[used], self.scale[n])
            groups.append((n, used, factor[0]))
            for t in np.unique(tie[noise == n]):
                rows = np.flatnonzero((noise == n) & (tie == t))
                own = np.searchsorted(used, hyper[rows])
                _, mean, precision = self.evidence(factor, t, self.phi[t, n])
                # With precision P = R' R, solving R x = z for standard normal z gives x the covariance P^-1.
                root = np.linalg.cholesky(precision).transpose(0, 2, 1)[own]
                phi[rows] = mean[own] + np.linalg.solve(root, rng.normal(size=(len(rows), len(self.mean), 1)))[..., 0]
        # Importance weights: the parameters were drawn with the law made linear at the mode; what its curvature changes
        # in the likelihood of each draw is put right by drawing again with these weights.
        exact = self.rows.y - self.law_of(phi)[0]
        for n, used, white in groups:
            for k, h in enumerate(used):
                rows = np.flatnonzero((noise == n) & (hyper == h))
                linear = self.linear_residual(phi[rows], tie[rows], n)
                log_weight[rows] = 0.5 * (squares(linear, white[k]) - squares(exact[rows], white[k]))
        again = np.sort(systematic(softmax(log_weight), count, rng))
        return self.with_misfit(phi[again], exact[again], hyper[again], tie[again], noise[again], rng)

    def linear_residual(self, phi: np.ndarray, tie: np.ndarray, noise: int) -> np.ndarray:
        """(K, n) residuals of draws under the linear form that they were drawn with."""
        modes = self.phi[:, noise]
        value, jacobian = self.law_of(modes)
        return self.rows.y - value[tie] - np.einsum("knq,kq->kn", jacobian[tie], phi - modes[tie])

    def with_misfit(
        self,
        phi: np.ndarray,
        residual: np.ndarray,
        hyper: np.ndarray,
        tie: np.ndarray,
        noise: np.ndarray,
        rng: np.random.Generator,
    ) -> Draws:
        """Draws of a misfit function for every draw of the parameters, given what they leave unexplained (K, n): a
        draw from the prior, moved by what it gets wrong at the rows (Matheron's rule)."""
        pairs, base = np.unique(np.column_stack([hyper, noise]), axis=0, return_inverse=True)
        base, bases, parts = base.ravel(), [], []
        for k, (h, n) in enumerate(pairs):
            rows = np.flatnonzero(base == k)
            basis = Basis(self.h[h], self.rows.x.shape[1], self.families, rng)
            features = basis.at(self.rows.points)
            free = (self.covariance(self.h[[h]], self.scale[n]) - self.rows.near.covariance(self.h[[h]]))[0]
            root = np.linalg.cholesky(free)
            prior = rng.normal(size=(len(rows), features.shape[1]))
            # Matheron's rule: prior draw + K* K^-1 (observed - what that draw, noise included, says at the rows) has
            # the mean and covariance of the conditional process; no covariance of the points asked for is needed.
            wrong = residual[rows] - prior @ features.T - rng.normal(size=(len(rows), len(free))) @ root.T
            parts.append((rows, prior + np.linalg.solve(features @ features.T + free, wrong.T).T @ features))
            bases.append(basis)
        weights = np.empty((len(phi), parts[0][1].shape[1]))
        for rows, found in parts:
            weights[rows] = found
        # Under Huber's density a run to come is as likely to be an outlier as the runs at hand were: it takes the
        # scale of one of them, picked at random.
        tail = self.scale[noise, rng.integers(len(self.rows.y), size=len(phi))]
        return Draws(self.split(phi), self.h[hyper], base, tuple(bases), weights, tie, noise, tail)


def posterior(
    rows: Rows,
    law: Law,
    ties: tuple[tuple[str, ...], ...],
    objective: str = "auto",
    seed: int = 0,
    known: np.ndarray | None = None,
    misfit: bool = True,
    samples: int = SAMPLES,
    scale: float = 1.0,
) -> Posterior:
    """Integrates over hyperparameters; `known` (1, 7) holds them instead, and without `misfit` there is none. scale: as
    for `physical`."""
    # Start from the prior's middle: modes there, then the sampler walks to where the likelihood is.
    rng, lone = np.random.default_rng(seed), not rows.family.any()
    prior = law.prior(rows.y, rows.features)
    noises = NOISES[objective]
    # Two families are a mean and a difference of parameters: a tie is then no other model but a difference held near
    # zero, so that all ties have one set of coordinates and their evidences compare.
    mean = prior.mean if lone else np.concatenate([prior.mean, 0 * prior.mean])
    sd = np.stack([prior.sd if lone else np.append(prior.sd, shared_sd(law, tie, prior.apart)) for tie in ties])
    tails = np.ones((len(noises), len(rows.y)))
    if objective == "raw-ls":  # noise of equal size in the unit of the losses
        tails[0] = np.exp(rows.y.mean() - rows.y)
    start = np.broadcast_to(mean, (len(ties), len(noises), len(mean))).copy()
    middle = physical(np.zeros((1, LATENTS)), misfit, scale) if known is None else known
    p = Posterior(rows, law, ties, noises, mean, sd, middle, np.empty(0), start, tails)
    p = settled(p, middle[0], start)
    if known is not None:
        return replace(p, h=known, score=p.scored(known))
    return sampled(p, samples, misfit, scale, rng)


def settled(p: Posterior, h: np.ndarray, start: np.ndarray) -> Posterior:
    """Modes of all models and the scales of the rows at one vector of hyperparameters."""
    p = replace(p, phi=p.modes(h, start))
    if set(p.noises) & {"huber", "lad"}:
        p = p.reweighted(h)
        p = replace(p, phi=p.modes(h, p.phi))
    return p


def sampled(p: Posterior, samples: int, misfit: bool, scale: float, rng: np.random.Generator) -> Posterior:
    """Adaptive importance sampling of the hyperparameters: the prior, then Student's t about a tempered mean."""
    # Importance sampling: draw hyperparameters from a density q that is easy to draw from, and weigh each by
    # posterior over q. It is exact for any q that reaches everywhere; how many of the samples count depends on how
    # well q fits. Sobol points cover the seven dimensions more evenly than random ones. In latents z the prior is
    # standard normal, so the prior's own samples need no weight, and later ones carry log N(z) - log q(z).
    z = ndtri(qmc.Sobol(LATENTS, seed=rng).random(samples))
    log_q: np.ndarray | None = None
    # One step from the prior to a posterior that is much narrower would leave all weight on one or two samples. Powers
    # of the likelihood lead there; each stage fits a proposal, with the tails of Student's t, to the stage before.
    for power in (*TEMPERS, None):
        h = physical(z, misfit, scale)
        score = p.scored(h)
        if log_q is not None:
            score = score + (-0.5 * (z**2).sum(-1) - log_q)[:, None, None]
        if power is None:
            break
        # Summed over ties and noises: the proposal is for the hyperparameters whatever the model.
        weight = softmax(power * logsumexp(score, axis=(1, 2)))
        centre = weight @ z
        spread = 1.2**2 * ((z - centre).T * weight @ (z - centre)) + 0.02 * np.eye(LATENTS)
        # The laws were made linear at the modes of the last stage's hyperparameters; they follow the centre.
        p = settled(p, physical(centre[None], misfit, scale)[0], p.phi)
        # Normal numbers over the root of chi-squared / 6 are Student's t with 6 degrees of freedom.
        u = ndtri(qmc.Sobol(LATENTS, seed=rng).random(samples)) * np.sqrt(6 / rng.chisquare(6, samples))[:, None]
        z = (centre + u @ np.linalg.cholesky(spread).T).clip(-5, 5)
        log_q = -(6 + LATENTS) / 2 * np.log1p((u**2).sum(-1) / 6)
    return replace(p, h=h, score=score)


def damped_newton(p: Posterior, white: np.ndarray, sd: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """(K, Q) modes of K models by Levenberg-Marquardt; white (K, n, n), sd (K, Q)."""

    def squared(at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        value, jacobian = p.law_of(at)
        r = (white @ (p.rows.y - value)[:, :, None])[..., 0]
        pull = (p.mean - at) / sd
        return (r**2).sum(-1) + (pull**2).sum(-1), r, jacobian, pull

    # Levenberg-Marquardt: a step is Newton's where the parabola holds, short and downhill where it does not.
    damping = np.full(len(phi), 1e-3)
    cost, r, jacobian, pull = squared(phi)
    for _ in range(MODE_STEPS):
        j = white @ jacobian
        normal = j.transpose(0, 2, 1) @ j
        slope = (j.transpose(0, 2, 1) @ r[:, :, None])[..., 0] + pull / sd
        ridge = (1 / sd**2 + damping[:, None] * np.einsum("kqq->kq", normal))[:, :, None] * np.eye(phi.shape[1])
        step = np.linalg.solve(normal + ridge, slope[:, :, None])[..., 0].clip(-3, 3)
        trial = squared(phi + step)
        better = trial[0] < cost
        gain = np.where(better, cost - trial[0], 0.0)
        phi = np.where(better[:, None], phi + step, phi)
        cost, r, jacobian, pull = (
            np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            for new, old in zip(trial, (cost, r, jacobian, pull), strict=True)
        )
        damping = np.where(better, damping / 5, damping * 6).clip(1e-10, 1e8)
        if (better & (gain < 1e-4) | (damping >= 1e8)).all():
            break
    return phi


def shared_sd(law: Law, tie: tuple[str, ...], apart: np.ndarray) -> np.ndarray:
    """(P,) prior sd of the difference between two families that share `tie`."""
    return np.where(np.isin(law.names, tie), TIED_SD, apart)


def kink(noise: str) -> float:
    """Where a density of the noise turns from a parabola to straight lines, in standard deviations."""
    return HUBER_KINK if noise == "huber" else LAD_KINK


def density_gain(noise: str, scale: np.ndarray) -> float:
    """Log density of the noise over that of normal noise with the scales (n,) that it was given.

    Huber's density is the highest of normal ones: its exponent is the least over w of w r^2 / 2 + k^2 (1 / w - 1) / 2,
    w = 1 / scale^2 (Geman & Reynolds 1992), with a normaliser of its own.
    """
    if noise not in ("huber", "lad"):
        return 0.0
    k = kink(noise)
    normaliser = np.log((2 * ndtr(k) - 1) + 2 * np.exp(-0.5 * k * k) / (k * np.sqrt(2 * np.pi)))
    return float((np.log(scale) - 0.5 * k * k * (scale**2 - 1) - normaliser).sum())


def squares(residual: np.ndarray, white: np.ndarray) -> np.ndarray:
    """(K,) squared length of whitened residuals (K, n)."""
    return ((residual @ white.T) ** 2).sum(-1)


def systematic(weight: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) indices by weight, with one random number (systematic resampling)."""
    return np.searchsorted(np.cumsum(weight), (np.arange(count) + rng.random()) / count).clip(0, len(weight) - 1)
