"""The smallest move that leaves every shield, which replaces the paper's sum where shields overlap.

The distance constraints ‖x0 + h − z_k‖ ≥ r_k are not convex, but in high dimension the smallest h is: with
w_k = x0 − z_k and e_k = r_k² − ‖w_k‖² they read 2 w_k·h + ‖h‖² ≥ e_k, and any ρ ≥ ‖h‖² can take the place of ‖h‖²,
because a step orthogonal to all w_k lengthens h and changes no w_k·h. So h solves

    min ρ   subject to   ρ ≥ ‖h‖²,   2 w_k·h + ρ ≥ e_k   for all k,

a convex problem. For a given ρ it is a non-negative least squares problem in the multipliers of the constraints; its
lower bound on ρ is a ratio that Newton's method (Dinkelbach 1967) raises to the optimum in a few rounds. For one shield
h = (r − d) w/d, the paper's formula; where normals oppose each other, the orthogonal step is the way out.

All functions work on float64 Gram matrices, so their cost depends on the number of active shields alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shielded.core.directions import tie_break

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64

_RIDGE = 1e-11  # keeps the linear systems solvable when references coincide or oppose each other
_SAFETY = 1e-9  # share by which rounding may have raised an earlier bound
_EXCHANGE_ROUNDS = 30
_GUESS_ROUNDS = 12
_MAX_FEW_SHIELDS = 64  # up to which Newton's method needs no guess
_MAX_BATCHED_SIZE = 64  # of systems that are solved at once
_NEWTON_ROUNDS = 25


def non_negative_quadratic(
    gram: Float64[Tensor, "n a a"],
    target: Float64[Tensor, "n a"],
    passive: Bool[Tensor, "n a"],
    valid: Bool[Tensor, "n a"],
) -> tuple[Float64[Tensor, "n a"], Bool[Tensor, "n a"]]:
    """Maximise ν·target − ½ νᵀ gram ν over ν ≥ 0 for a batch, by block principal pivoting (Kim and Park 2011).

    Args:
        gram: (n, A, A) positive semi-definite.
        target: (n, A).
        passive: (n, A) bool, a first guess of the entries with ν > 0.
        valid: (n, A) bool; the other entries are padding and stay 0.

    Returns:
        ν (n, A), and its passive set (n, A) bool.
    """
    n, size = target.shape
    passive = passive & valid
    result = torch.zeros_like(target)
    fewest = torch.full((n,), size + 1, device=target.device)
    patience = torch.full((n,), 3, device=target.device)
    order = torch.arange(size, device=target.device)
    open_rows = torch.arange(n, device=target.device)  # not solved yet
    for _ in range(_EXCHANGE_ROUNDS):
        free, wanted = passive[open_rows], target[open_rows]
        multipliers, inner = (part.squeeze(1) for part in _solved(gram, wanted[:, None], free, open_rows))
        result[open_rows] = multipliers
        slack = inner - wanted
        # The rounding error of the sum, entry by entry: near a coincidence the target has another magnitude.
        rounding = 1e-10 * wanted.abs() + 1e-14 * multipliers.abs().sum(dim=1, keepdim=True)
        wrong = valid[open_rows] & torch.where(free, multipliers < 0, slack < -rounding)
        count = wrong.sum(dim=1)
        unsolved = count > 0
        if not unsolved.any():
            break
        # Exchange all wrong entries at once while that helps; then only the last one, which cannot cycle.
        better = count < fewest[open_rows]
        fewest[open_rows] = torch.where(better, count, fewest[open_rows])
        patience[open_rows] = torch.where(better, 3, patience[open_rows] - 1)
        last = (wrong * (order + 1)).argmax(dim=1, keepdim=True) == order
        passive[open_rows] = free ^ torch.where((patience[open_rows] >= 0).unsqueeze(1), wrong, wrong & last)
        open_rows = open_rows[unsolved]
    return result.clamp(min=0), passive


def _solved(gram: Tensor, targets: Tensor, free: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the free entries ν (m, T, A) of some rows (m,) of a batch, the others being 0; return ν and gram ν.

    Few entries are free, so the systems consist of these alone, padded to the same number.

    Args:
        gram: (n, A, A).
        targets: (m, T, A), T for each row.
        free: (m, A) bool.
        rows: (m,) indices into the batch.
    """
    count = free.sum(dim=1, keepdim=True)
    first = free.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(1, int(count.max()))]
    taken = torch.arange(first.shape[1], device=free.device) < count
    lines = gram[rows[:, None], first]  # (m, F, A)
    system = lines.gather(2, first[:, None, :].expand(-1, first.shape[1], -1))
    system *= taken[:, :, None] & taken[:, None, :]
    system += torch.diag_embed(torch.where(taken, _RIDGE, 1.0).to(gram.dtype))
    at = first[:, None, :].expand(-1, targets.shape[1], -1)
    right = targets.gather(2, at) * taken[:, None, :]
    solution = _solve_systems(system, right.transpose(1, 2)).transpose(1, 2) * taken[:, None, :]
    return torch.zeros_like(targets).scatter_(2, at, solution), solution @ lines


def _solve_systems(systems: Tensor, right: Tensor) -> Tensor:
    """Solve linear systems (n, A, A) with right sides (n, A, T).

    Large ones go one by one: after `torch.set_num_threads`, torch factorises several at once in threads that MKL
    starts threads of its own in, which ends in wrong results or never (pytorch/pytorch#142815).
    """
    if systems.device.type == "cpu" and len(systems) > 1 and systems.shape[1] > _MAX_BATCHED_SIZE:
        return torch.stack([torch.linalg.solve(system, b) for system, b in zip(systems, right, strict=True)])
    return torch.linalg.solve(systems, right)


def _touched(gram: Tensor, excess: Tensor, slope: Tensor, passive: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Guess which of many constraints u_k·h ≥ excess − ρ slope are touched, and bound ρ from below.

    If the passive constraints were equations, ν = α − ρ β with α = G⁻¹ excess and β = G⁻¹ slope, and ρ = ‖h‖² were the
    smaller root of a quadratic equation. So each exchange of entries has its best ρ, without rounds for ρ around rounds
    for ν. This may go round in circles; Newton's method goes on from wherever it ends.

    Args:
        gram: (n, A, A).
        excess: (n, A).
        slope: (n, A).
        passive: (n, A) bool, a first guess.
        valid: (n, A) bool, False marks padding.

    Returns:
        Touched constraints (n, A) bool, and the bound (n,), 0 where the exchange has not ended.
    """
    passive = passive & valid
    bound = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    open_rows = torch.arange(len(gram), device=gram.device)
    for _ in range(_GUESS_ROUNDS):
        free, sides = passive[open_rows], torch.stack([excess[open_rows], slope[open_rows]], dim=1)
        solutions, inner = _solved(gram, sides, free, open_rows)
        constant, linear = (solutions @ sides.transpose(1, 2)).unbind(dim=1)  # (α·excess, α·slope), (β·…)
        middle = constant[:, 1] + 0.5
        root = (middle.square() - linear[:, 1] * constant[:, 0]).clamp(min=0).sqrt()
        rho = (constant[:, 0] / (middle + root))[:, None]
        multipliers, reached = solutions[:, 0] - rho * solutions[:, 1], inner[:, 0] - rho * inner[:, 1]
        short = reached < sides[:, 0] - rho * sides[:, 1] - 1e-10
        wrong = valid[open_rows] & torch.where(free, multipliers < 0, short)
        right = ~wrong.any(dim=1)
        gain = (multipliers * (sides[:, 0] - reached / 2)).sum(dim=1)
        ratio = gain / (0.5 + (multipliers * sides[:, 1]).sum(dim=1))
        bound[open_rows] = torch.where(right & ratio.isfinite(), ratio, 0)
        passive[open_rows] = free ^ wrong
        open_rows = open_rows[~right]
        if not len(open_rows):
            break
    return passive, bound


def smallest_move(
    gram: Float64[Tensor, "n a a"],
    distance: Float64[Tensor, "n a"],
    radius: Float64[Tensor, "n a"],
    valid: Bool[Tensor, "n a"],
    directed: Bool[Tensor, "n a"],
    guess: Bool[Tensor, "n a"] | None = None,
    least: Float64[Tensor, " n"] | None = None,
) -> tuple[Float64[Tensor, "n a"], Float64[Tensor, " n"]]:
    """Compute multipliers ν of the smallest move out of all shields, h = Σ_k ν_k u_k with u_k = (x0 − z_k)/d_k.

    Args:
        gram: (n, A, A) float64, u_k·u_l.
        distance: (n, A) float64.
        radius: (n, A) float64.
        valid: (n, A) bool, False marks padding.
        directed: (n, A) bool, valid and d_k > 0; the others only demand that ‖h‖ reaches r_k.
        guess: (n, A) bool, where ν > 0 is expected; None: nothing is known. It saves time and changes no result.
        least: (n,) what ‖h‖² is known to reach, from the move out of some of these shields; None: nothing is known.

    Returns:
        ν (n, A), non-negative, and what ‖h‖² reaches at least (n,). Where the normals oppose each other, Σ ν_k u_k
        alone does not leave all shields; `way_out` adds a step at a right angle to them.
    """
    scale = torch.where(valid, radius, 0).amax(dim=1, keepdim=True)
    deepest = torch.where(valid, (radius - distance) / scale, 0).clamp(min=0).amax(dim=1, keepdim=True)
    distance = torch.where(directed, distance / scale, 1.0)
    radius = torch.where(directed, radius / scale, 0.0)
    excess = (radius.square() - distance.square()) / (2 * distance)  # u_k·h ≥ excess − ρ slope
    slope = 1 / (2 * distance)
    bound = deepest.square()  # leaving the deepest shield alone takes this much
    if least is not None:
        bound = torch.maximum(bound, (1 - _SAFETY) * least[:, None] / scale.square())
    result = torch.zeros_like(distance)
    passive = directed & (excess > bound * slope if guess is None else guess)
    if distance.shape[1] > _MAX_FEW_SHIELDS:
        passive, reached = _touched(gram, excess, slope, passive, directed)
        bound = torch.maximum(bound, reached[:, None])
    open_rows = torch.arange(len(distance), device=distance.device)  # whose bound still rises
    for _ in range(_NEWTON_ROUNDS):
        target = (excess[open_rows] - bound[open_rows] * slope[open_rows]) * directed[open_rows]
        open_gram = gram if len(open_rows) == len(gram) else gram[open_rows]
        multipliers, passive[open_rows] = non_negative_quadratic(
            open_gram, target, passive[open_rows], directed[open_rows]
        )
        result[open_rows] = multipliers
        energy = (multipliers * _times(open_gram, multipliers)).sum(dim=1)
        gain = (multipliers * excess[open_rows]).sum(dim=1) - energy / 2
        ratio = gain / (0.5 + (multipliers * slope[open_rows]).sum(dim=1))
        rises = ratio > bound[open_rows, 0] * (1 + 1e-12)
        bound[open_rows, 0] = torch.maximum(bound[open_rows, 0], ratio)
        open_rows = open_rows[rises]
        if not len(open_rows):
            break
    return result * scale, (bound * scale.square()).squeeze(1)


def stays_inside(
    gram: Float64[Tensor, "n a a"],
    multipliers: Float64[Tensor, "n a"],
    distance: Float64[Tensor, "n a"],
    radius: Float64[Tensor, "n a"],
    valid: Bool[Tensor, "n a"],
) -> Bool[Tensor, " n"]:
    """Find the images (n,) that Σ ν_k u_k leaves inside a shield, or leads out only far away.

    In low dimension half-spaces may meet far away, while a straight way out takes at most two radii.
    """
    inner = _times(gram, multipliers)
    energy = (multipliers * inner).sum(dim=1, keepdim=True)
    deficit = radius.square() - (distance.square() + 2 * distance * inner + energy)
    far = energy.squeeze(1) > (2 * radius.amax(dim=1)).square()
    return far | (valid & (deficit > 1e-9 * radius.square())).any(dim=1)


def escape_length(along: Float64[Tensor, "n a"], deficit: Float64[Tensor, "n a"]) -> Float64[Tensor, " n"]:
    """Compute the step t along a unit vector v that leaves every shield: max_k of the root of ‖y − z_k + t v‖ = r_k.

    Args:
        along: (n, A) (y − z_k)·v.
        deficit: (n, A) r_k² − ‖y − z_k‖².
    """
    return (torch.sqrt((along.square() + deficit).clamp(min=0)) - along).where(deficit > 0, 0).amax(dim=1)


def way_out(
    gram: Float64[Tensor, "n a a"],
    multipliers: Float64[Tensor, "n a"],
    distance: Float64[Tensor, "n a"],
    radius: Float64[Tensor, "n a"],
    valid: Bool[Tensor, "n a"],
    noise: Float64[Tensor, "n a"],
    noise_length: Float64[Tensor, " n"],
) -> tuple[Float64[Tensor, "n a"], Float64[Tensor, " n"]]:
    """Lead out of the shields that Σ ν_k u_k does not leave, on from there or straight from x0, whichever is shorter.

    The step is at a right angle to all normals, along the remaining component of the predicted noise.

    Args:
        gram: (n, A, A) float64, u_k·u_l; zero for shields without a direction.
        multipliers: (n, A) ν.
        distance: (n, A).
        radius: (n, A).
        valid: (n, A) bool.
        noise: (n, A) noise·u_k, zero for shields without a direction.
        noise_length: (n,) ‖noise‖.

    Returns:
        The whole move, as coefficients (n, A) of the normals u_k and (n,) of the noise.
    """
    ridge = 1e-9 * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    share = _solve_systems(gram + ridge, noise.unsqueeze(-1)).squeeze(-1)
    crossing = noise - _times(gram, share)  # u_k · (noise − Σ share_l u_l)
    length = (noise_length.square() - (share * (noise + crossing)).sum(dim=1)).clamp(min=0).sqrt()
    spanned = length < 1e-3 * noise_length  # as many shields as dimensions, where any direction leads out in the end
    share = torch.where(spanned[:, None], 0, share)
    length = torch.where(spanned, noise_length, length)[:, None]
    along = torch.where(spanned[:, None], noise, crossing) / length
    inner = _times(gram, multipliers)
    energy = (multipliers * inner).sum(dim=1)
    beside = (multipliers * along).sum(dim=1)  # Σ ν_k u_k · direction
    remaining = radius.square() - distance.square() - 2 * distance * inner - energy[:, None]
    on = escape_length(distance * along + beside[:, None], torch.where(valid, remaining, 0))
    straight = escape_length(distance * along, torch.where(valid, radius.square() - distance.square(), 0))
    shorter = energy + 2 * on * beside + on.square() <= straight.square()
    step = torch.where(shorter, on, straight) / length[:, 0]
    return torch.where(shorter[:, None], multipliers, 0) - step[:, None] * share, step


def _times(gram: Tensor, vector: Tensor) -> Tensor:
    return (gram @ vector.unsqueeze(-1)).squeeze(-1)


def separate(
    points: Float64[Tensor, "b n"], radius: Float64[Tensor, "b b"], repels: Bool[Tensor, "b b"], rounds: int = 24
) -> tuple[Float64[Tensor, "b n"], Bool[Tensor, " b"]]:
    """Compute the smallest joint move that puts every pair at least its radius apart; both sides of a pair share it.

    Each round replaces the distance constraints by conservative half-spaces at the points reached so far and solves
    for the smallest move from the start (sequential convex programming).

    Args:
        points: (B, N) float64 coordinates.
        radius: (B, B) distances to keep.
        repels: (B, B) bool, pairs that repel each other.
        rounds: how many times pairs that came too close are added, at most.

    Returns:
        The move (B, N), and (B,) bool: rows that still have a pair that is too close.
    """
    first, second = torch.triu_indices(len(points), len(points), 1, device=points.device)
    pairs = repels[first, second]
    first, second = first[pairs], second[pairs]
    radius = radius[first, second]
    move = torch.zeros_like(points)
    chosen = torch.zeros(len(first), dtype=torch.bool, device=points.device)
    fixed = tie_break(len(points), points.shape[1], points.device).double()
    close = chosen
    for attempt in range(rounds + 1):
        offset = (points + move)[first] - (points + move)[second]
        distance = offset.norm(dim=1)
        close = distance < radius * (1 - 1e-6)
        if attempt == rounds or not close.any():
            break
        # The closest pairs first: separating them usually separates the others, and the system stays small.
        new = torch.where(close & ~chosen, distance, torch.inf)
        chosen = chosen | (new <= new.topk(min(256, len(new)), largest=False).values[-1]) & close
        i, j = first[chosen], second[chosen]
        # Points that rounding makes equal have no direction between them; any other one separates them.
        along = torch.where(distance[:, None] > 0, offset, fixed[first] - fixed[second])[chosen]
        unit = along / along.norm(dim=1, keepdim=True)
        incidence = torch.zeros(len(i), len(points), dtype=points.dtype, device=points.device)
        row = torch.arange(len(i), device=points.device)
        incidence[row, i], incidence[row, j] = 1, -1
        gram = (unit @ unit.T) * (incidence @ incidence.T)
        target = radius[chosen] * (1 + 1e-5) - (unit * (points[i] - points[j])).sum(dim=1)
        everything = torch.ones(1, len(i), dtype=torch.bool, device=points.device)
        multipliers, _ = non_negative_quadratic(gram[None], target[None], target[None] > 0, everything)
        move = incidence.T @ (multipliers[0, :, None] * unit)
    unresolved = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    unresolved[first[close]] = True
    unresolved[second[close]] = True
    return move, unresolved
