"""Lists of runs: what is run, what failed, and what has its row."""
import json

import pytest
import timm
import torch

from scripts.results import read_csv
from scripts.training.jobs import Children, Job, run_jobs, run_one, store, unfinished
from scripts.training.script import ORIGIN, origin

KEYS, COLUMNS = ('setting', 'seed'), ('setting', 'seed', 'score', 'command')
RESULT = {'score': 2, **dict(zip(ORIGIN, ('cpu: X', '2', '1', 'abc', '2026-01-01')))}


def write_run(folder, result=RESULT, log='step,loss,seconds\n1,3,9\n2,1,20\n'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'result.json').write_text(result if isinstance(result, str) else json.dumps(result))
    (folder / 'log.csv').write_text(log)


def test_a_run(tmp_path):
    """A process that fails is told with its last lines; a result that is there is read, and nothing is run."""
    job = Job(('a', 'b', '0'), 'json.tool', ('--what', 'two words'))
    with pytest.raises(RuntimeError, match="--what 'two words'\n  failed: usage: (.|\n)*can't open 'two words'"):
        run_one(job, tmp_path / 'run', 1, Children())
    assert 'usage' in (tmp_path / 'run' / 'output.txt').read_text()
    write_run(tmp_path / 'run')
    assert run_one(job, tmp_path / 'run', 1, Children()) == {**RESULT, 'loss': '1', 'seconds': '20'}
    stopped = Children()
    stopped.stop()
    with pytest.raises(RuntimeError, match='failed'):
        run_one(job, tmp_path / 'other', 1, stopped)


def test_origin():
    """A result says what made it; one of an older version, which does not, is no row, and its files stay."""
    made = origin(torch.device('cpu'), 'abc')
    assert tuple(made) == ORIGIN and made['device'].startswith('cpu: ') and made['commit'] == 'abc'
    assert (made['torch'], made['timm']) == (torch.__version__, timm.__version__)


def test_result_of_an_older_version(tmp_path):
    write_run(tmp_path / 'run', {'score': 2, 'torch': '2'})
    with pytest.raises(RuntimeError, match='result.json does not say its device, timm, commit, date, which the row'):
        run_one(Job(('a', '0'), 'json.tool', ()), tmp_path / 'run', 1, Children())
    assert (tmp_path / 'run' / 'result.json').exists()


def test_runs_whose_files_are_broken(tmp_path, capsys):
    """They are told, each by its name, and do not keep back the others; nor does a row that cannot be made."""
    names = 'cut', 'no log', 'empty log', 'no file', 'no score', 'a'
    jobs = [Job((name, '0'), 'json.tool', (name,)) for name in names]
    for job, (result, log) in zip(jobs, (('{"sco', ''), (RESULT, ''), (RESULT, 'step,loss,seconds\n'), (RESULT, ''),
                                         ({**RESULT, 'score': None}, None), (RESULT, None))):
        write_run(job.folder(tmp_path), result, *([] if log is None else [log]))
    (jobs[1].folder(tmp_path) / 'log.csv').unlink()
    folder = jobs[3].folder(tmp_path)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text('a file where the folder is to be')
    rows = []
    assert run_jobs(jobs, tmp_path, 1, 1, lambda job, result: rows.append((job.name, result['score'] + 1))) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert rows == [('a, 0', 3)] and '1 runs done, 5 failed' in captured.out and len(lines) == 5
    for job, words in zip(jobs, ('(JSONDecodeError: ', '(FileNotFoundError: ', '(IndexError: ', ' FileExistsError: ',
                                 ' TypeError: ')):
        line, = [line for line in lines if line.startswith(f'{job.name}: ')]
        assert words in line


def test_list(tmp_path, capsys):
    """A failure does not end the others; a row counts for its command alone, and keeps its place."""
    good, bad = Job(('a', '0'), 'json.tool', ('x',)), Job(('b', '0'), 'json.tool', ('--nothing',))
    folder = good.folder(tmp_path)
    write_run(folder)
    path = tmp_path / 'rows.csv'

    def finished(job, result):
        store(path, COLUMNS, KEYS, {**dict(zip(KEYS, job.key)), 'score': str(result['score']), 'command': job.command})

    assert unfinished([bad, good], path, KEYS) == [bad, good]
    assert run_jobs([bad, good], tmp_path, 2, 1, finished) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith('b, 0: --nothing\n  failed: ') and '1 runs done, 1 failed' in captured.out
    assert unfinished([bad, good], path, KEYS) == [bad] and 'a, 0: has its row' in capsys.readouterr().out
    other = Job(('a', '0'), 'json.tool', ('y',))
    assert unfinished([other], path, KEYS) == [other] and other.folder(tmp_path) != folder
    for job, score in ((bad, 5), (other, 7)):
        finished(job, {'score': score})
    assert [(row['setting'], row['score']) for row in read_csv(path)] == [('a', '7'), ('b', '5')]
