"""Preference tuning: DPO by TRL, under the same DeepSpeed JSON and launcher as pretraining."""
