"""The comparison behind ``make finetune``: every method, one network, two tasks."""
