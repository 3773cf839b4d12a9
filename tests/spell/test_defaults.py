"""Defaults of Spell: which radii shrink, and how far shields reach beyond the radius."""

import pytest
import torch

from shielded import ProtectedSet, Spell
from shielded.latent_space import LatentSpace
from shielded.spell import Calibration, History

DIM, LEVEL = 64, {"alpha": 0.5, "sigma": 0.5}  # noise level 0.5
RADIUS = 2.0


def point(*values):
    x = torch.zeros(1, DIM)
    x[0, : len(values)] = torch.tensor(values)
    return x


def shrunk(energy, x0):
    """The radius at noise level 0.5 without a measured error: r² − min(energy − ‖x0‖², energy·t²)."""
    return (RADIUS**2 - min(max(energy - float(x0.square().sum()), 0), energy * 0.25)) ** 0.5


def test_protected_radii_shrink_and_others_do_not():
    """Each kind of reference at a distance between the posterior and the full radius."""
    reference = point(4.0)
    x0 = point(4.0, 1.5)
    calibration = Calibration(energy=2.2 + float(x0.square().sum()))
    assert shrunk(calibration.energy, x0) < 1.5 < RADIUS
    protected = Spell(reference, RADIUS, batch=False, calibration=calibration)
    assert not protected(x0, **LEVEL).any()
    constant = Spell(reference, RADIUS, batch=False, radius_schedule="constant")
    assert constant(x0, **LEVEL).any()
    batch = Spell(point(40.0), RADIUS, calibration=calibration)
    assert batch(torch.cat([x0, reference]), **LEVEL).flatten(1).any(dim=1).all()
    history = History()
    history.add(reference)
    remembered = Spell(point(40.0), RADIUS, batch=False, history=history, calibration=calibration)
    assert remembered(x0, **LEVEL).any()
    all_shrink = Spell(
        point(40.0), RADIUS, batch=False, history=history, calibration=calibration, radius_schedule="posterior"
    )
    assert not all_shrink(x0, **LEVEL).any()


def test_the_energy_of_the_set_is_the_estimate_without_a_calibration():
    references = torch.cat([point(3.0), point(0.0, 4.0)])  # mean energy 12.5
    for distance in (0.8, 1.2, 1.6, 1.9, 2.1):
        x0 = point(3.0, 0.0, distance)
        spell = Spell(references, RADIUS, overcompensation=1.0, batch=False)
        moved = x0 + spell(x0, **LEVEL)
        expected = max(shrunk(12.5, x0), distance)
        assert float((moved - references[:1]).norm()) == pytest.approx(expected, rel=1e-5)


def test_without_a_noise_level_and_with_a_mask_radii_are_full():
    reference, x0 = point(4.0), point(4.0, 1.9)
    assert float((x0 + Spell(reference, RADIUS, 1.0, batch=False)(x0) - reference).norm()) == pytest.approx(RADIUS)
    mask = torch.ones(DIM)
    masked = Spell(reference, RADIUS, 1.0, batch=False, mask=mask)
    assert float((x0 + masked(x0, **LEVEL) - reference).norm()) == pytest.approx(RADIUS)


@pytest.mark.parametrize("margin", [0.0, 0.25, 1.0])
def test_margin_widens_protected_shields_alone(margin, tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((DIM,)))
    protected.add(point(4.0), ["a"], RADIUS)
    x0 = point(4.0, 0.5)
    for references, radius in (protected, None), (point(4.0), RADIUS):
        spell = Spell(references, radius, 1.0, batch=False, margin=margin)
        assert float((x0 + spell(x0) - point(4.0)).norm()) == pytest.approx((1 + margin) * RADIUS)
        assert float((spell.finish(x0.clone()) - point(4.0)).norm()) == pytest.approx((1 + margin) * RADIUS, rel=1e-4)
    pair = torch.cat([point(40.0), point(40.0, 0.5)])
    apart = Spell(point(4.0), RADIUS, 1.0, margin=margin)
    moved = pair + apart(pair)
    assert float((moved[0] - moved[1]).norm()) == pytest.approx(RADIUS, rel=1e-4)


@pytest.mark.parametrize("margin", [-0.1, float("inf"), float("nan")])
def test_a_margin_out_of_range_is_refused(margin):
    with pytest.raises(ValueError, match="margin"):
        Spell(point(1.0), RADIUS, batch=False, margin=margin)
