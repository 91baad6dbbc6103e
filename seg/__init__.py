"""The machinery behind the experiments; docs/EDITING.md says what is where."""
