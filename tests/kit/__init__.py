"""What tests, the demo and the benchmarks share: fake and planted parts, servers, clusters, and where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "tests" / "assets"
TINY_MOE = ASSETS / "tiny_moe"  # the small trained model
