"""Prompts in six categories, for measurements: what people have small machines write."""

from fleet_cli.prompts.prompts import CATEGORIES, Prompt, built_in, read_prompts_by_category, some

__all__ = ["CATEGORIES", "Prompt", "built_in", "read_prompts_by_category", "some"]
