"""Lists of runs: what is run, what failed, and what has its row."""
import pytest

from scripts.results import read_csv
from scripts.training.jobs import Children, Job, run_jobs, run_one, store, unfinished

KEYS, COLUMNS = ('setting', 'seed'), ('setting', 'seed', 'score', 'command')


def test_a_run(tmp_path):
    """A process that fails is told with its last lines; a result that is there is read, and nothing is run."""
    job = Job(('a', 'b', '0'), 'json.tool', ('--what', 'two words'))
    with pytest.raises(RuntimeError, match="--what 'two words'\n  failed: usage: (.|\n)*can't open 'two words'"):
        run_one(job, tmp_path / 'run', 1, Children())
    assert 'usage' in (tmp_path / 'run' / 'output.txt').read_text()
    (tmp_path / 'run' / 'result.json').write_text('{"score": 2}')
    (tmp_path / 'run' / 'log.csv').write_text('step,loss,seconds\n1,3,9\n2,1,20\n')
    assert run_one(job, tmp_path / 'run', 1, Children()) == {'score': 2, 'loss': '1', 'seconds': '20'}
    stopped = Children()
    stopped.stop()
    with pytest.raises(RuntimeError, match='failed'):
        run_one(job, tmp_path / 'other', 1, stopped)


def test_list(tmp_path, capsys):
    """A failure does not end the others; a row counts for its command alone, and keeps its place."""
    good, bad = Job(('a', '0'), 'json.tool', ('x',)), Job(('b', '0'), 'json.tool', ('--nothing',))
    folder = good.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text('{"score": 2}')
    (folder / 'log.csv').write_text('step,loss,seconds\n1,3,9\n')
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
