"""Validation loss, reference scores and reports. Takes plain values: no engine, no configs."""
