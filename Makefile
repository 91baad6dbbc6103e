PYTHON ?= python3
ENV := .venv
TOY := data/VOCdevkit/Toy

demo: $(ENV)/installed $(TOY)
	$(ENV)/bin/python train.py --data $(TOY) --limit 64 --epochs 10 --batch-size 4 --out demo --overwrite

test: $(ENV)/installed-dev
	$(ENV)/bin/python -m pytest -n 2 --dist loadscope

$(ENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is required: make PYTHON=/path/to/python3 ...")'
	$(PYTHON) -m venv $(ENV)
	$(ENV)/bin/python -m pip install -r requirements.txt
	touch $@

$(ENV)/installed-dev: $(ENV)/installed requirements-dev.txt
	$(ENV)/bin/python -m pip install -r requirements-dev.txt
	touch $@

$(TOY): | $(ENV)/installed
	$(ENV)/bin/python download.py --toy

clean:
	rm -rf demo .pytest_cache __pycache__ */__pycache__ */*/__pycache__

.PHONY: demo test clean
