PYTHON ?= python3
ENV := .venv
TOY := data/VOCdevkit/Toy

demo: $(ENV)/installed $(TOY)
	$(ENV)/bin/python train_5_a.py --data $(TOY) --epochs 20 --out demo --overwrite
	$(ENV)/bin/python predict.py demo/best_train_5_a.pt $(TOY)/JPEGImages/00042[345].jpg --out demo/predictions --overwrite
	@echo "open demo/plots/train_5_a_report.html; next: $(ENV)/bin/python download.py && $(ENV)/bin/python train.py"

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
