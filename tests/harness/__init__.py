"""What the tests of several rooms share: tokens, policies, a real Envoy, a whole running system."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
