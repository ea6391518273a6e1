"""A plugin of pytest: point timm's own tests/test_models.py at another package's models.

Environment:
    TIMM_SUITE_PKG     package whose import registers the models (required)
    TIMM_SUITE_MODELS  fnmatch patterns of the architectures to test, separated by spaces (empty: all of the package)

timm's tests get their models in three ways, and each is redirected:
    `list_models()` while the tests are collected      -> lists the selected architectures only
    names written into a parametrisation ('resnet18')  -> 'resnet18_fadc' and other variants that are selected, or none
    names written into the body of a test              -> the first of these, by renaming inside `create_model`
Everything else, tests of other families above all, is deselected.
"""
import fnmatch
import importlib
import inspect
import os

import pytest
import timm

SUFFIXES = ('_fadc', '_dcn', '_dcn_fadc')

# The only tests that could be about our models and do not run, with the reason.
NOT_RUN = {
    'test_model_inference': 'downloads weights and reference tensors from the Hub, timm/<model name> in test/',
}

_timm_list_models = timm.list_models
_parametrize = inspect.signature(pytest.Metafunc.parametrize)
_ParameterSet = type(pytest.param())


def _select_models() -> set[str]:
    package = os.environ.get('TIMM_SUITE_PKG')
    if not package:
        raise pytest.UsageError('timm_suite_plugin: set TIMM_SUITE_PKG to the package to test')
    others = set(_timm_list_models())
    try:
        importlib.import_module(package)
    except ImportError as e:
        raise pytest.UsageError(f'timm_suite_plugin: cannot import {package}: {e}') from e
    # fadc_lifted builds what a saved config.json describes, and nothing without one
    models = set(_timm_list_models()) - others - {'fadc_lifted'}
    if not models:
        raise pytest.UsageError(f'timm_suite_plugin: importing {package} registered no models')

    patterns = os.environ.get('TIMM_SUITE_MODELS', '').split()
    unused = [p for p in patterns if not fnmatch.filter(models, p)]
    if unused:  # a typing error must not pass as "all tests passed"
        raise pytest.UsageError(f'timm_suite_plugin: no model of {package} matches {", ".join(unused)}')
    return {m for m in models if not patterns or any(fnmatch.fnmatch(m, p) for p in patterns)}


MODELS = _select_models()


def _ours(name: object) -> list[str]:
    """The selected models that a name in timm's tests stands for: itself, or its namesakes with our suffixes."""
    if not isinstance(name, str):  # the placeholder of an empty parametrisation
        return []
    arch, dot, tag = name.partition('.')
    return [candidate + dot + tag for candidate in (arch, *(arch + s for s in SUFFIXES)) if candidate in MODELS]


def _list_models(
        filter='', module='', pretrained=False, exclude_filters='', name_matches_cfg=False, include_tags=None):
    # `module` names timm's families that support a feature; ours are kept in modules of other names and support them
    # all. What timm excludes (too big for its runners) is excluded here under our names too.
    excluded = [exclude_filters] if isinstance(exclude_filters, str) else exclude_filters
    excluded = [f + suffix for f in excluded if f for suffix in ('', *SUFFIXES)]
    names = _timm_list_models(
        filter, pretrained=pretrained, exclude_filters=excluded, name_matches_cfg=name_matches_cfg,
        include_tags=include_tags)
    return [n for n in names if n.partition('.')[0] in MODELS]


def _list_pretrained(filter='', exclude_filters=''):
    return _list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


# Before the test module is imported, for it does `from timm import list_models` and calls it in its decorators.
timm.list_models, timm.list_pretrained = _list_models, _list_pretrained


def _rename_in_mark(mark: pytest.Mark) -> pytest.Mark:
    call = _parametrize.bind(None, *mark.args, **mark.kwargs).arguments
    names = call['argnames']
    names = [n.strip() for n in names.split(',') if n.strip()] if isinstance(names, str) else list(names)
    if 'model_name' not in names:
        return mark
    rows = []
    for value in call['argvalues']:
        is_param = isinstance(value, _ParameterSet)
        row = list(value.values) if is_param else list(value) if len(names) > 1 else [value]
        for name in _ours(row[names.index('model_name')]):
            row[names.index('model_name')] = name
            rows.append(pytest.param(*row, marks=value.marks if is_param else ()))
    # `ids` are left out: they would name timm's models, one for each row there was
    options = {k: call[k] for k in ('indirect', 'scope') if k in call}
    return pytest.mark.parametrize(names, rows, **options).mark


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    marks = metafunc.definition.own_markers
    marks[:] = [_rename_in_mark(m) if m.name == 'parametrize' else m for m in marks]


@pytest.fixture(autouse=True)
def _rename_in_body(request, monkeypatch):
    if 'model_name' not in request.fixturenames:
        create = request.module.create_model
        monkeypatch.setattr(
            request.module, 'create_model',
            lambda name, *args, **kwargs: create((_ours(name) or [name])[0], *args, **kwargs))


def _keep(item) -> bool:
    if item.originalname in NOT_RUN:
        return False
    if 'model_name' in item.fixturenames:
        return bool(_ours(item.callspec.params['model_name']))
    return any(_ours(const) for const in item.function.__code__.co_consts)


def pytest_collection_modifyitems(config, items):
    dropped = [item for item in items if not _keep(item)]
    items[:] = [item for item in items if _keep(item)]
    config.hook.pytest_deselected(items=dropped)


def pytest_report_header():
    lines = [f'timm suite: timm {timm.__version__}, {len(MODELS)} models of {os.environ["TIMM_SUITE_PKG"]}']
    return lines + [f'not run: {test} ({reason})' for test, reason in NOT_RUN.items()]
