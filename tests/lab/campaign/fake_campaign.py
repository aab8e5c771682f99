"""A campaign of six steps for the tests."""

from collections.abc import Sequence

from nested_lm.config.campaign import CampaignConfig


def campaign(*, seeds: Sequence[int] = (1, 1)) -> CampaignConfig:
    """Data, two trainings, their evaluations, a report."""
    steps: list[dict[str, object]] = [
        {"kind": "data", "id": "data", "config": "data/demo", "overrides": ["output_dir=out/text"]}
    ]
    for name, preset, seed in zip(
        ("hope", "transformer"), ("hope/demo", "baselines/transformer_demo"), seeds, strict=True
    ):
        overrides = [f"output_dir=out/{name}", f"seed={seed}"]
        steps.append({"kind": "train", "id": name, "config": preset, "after": ["data"], "overrides": overrides})
    steps += [{"kind": "eval", "id": f"eval-{name}", "run": name} for name in ("hope", "transformer")]
    steps.append({"kind": "report", "id": "report", "after": ["eval-hope", "eval-transformer"]})
    return CampaignConfig.model_validate(
        {"name": "tiny", "title": "A tiny campaign", "output_dir": "out", "steps": steps}
    )
