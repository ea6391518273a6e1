"""A loopback server for the part of the Hub's HTTP API that `huggingface_hub` uses to load and to publish a model.

Repositories live in memory. Small text files are git blobs, weights are LFS objects behind a redirect to another host
name, as on the Hub. `Hub.faults` breaks transfers on purpose, `Hub.log` remembers every request.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Dict, List, Optional
from urllib.parse import unquote, urlsplit

LFS = re.compile(r'\.(safetensors|bin|pth)$')
REPO = r'/(?P<repo>[^/]+/[^/]+)'
TOKEN = 'hf_loopback_0123456789abcdef'


def oid_of(path: str, content: bytes) -> str:
    """What the Hub gives as ETag: SHA-256 for LFS, else the hash of a git blob."""
    if LFS.search(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: the files of each commit, in order; the last one is `main`."""
    private: bool = False
    commits: Dict[str, Dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: Dict[str, bytes]) -> str:
        """A new commit with these files and nothing else."""
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = dict(files)
        return oid

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> Dict[str, bytes]:
        return self.commits[self.main]


class Hub:
    """The server. `faults` maps the name of a step ('cdn', 'lfs', 'commit') to what is called in its place, with the
    handler and the bytes to send; it returns True if it has answered.
    """

    def __init__(self) -> None:
        self.repos: Dict[str, Repo] = {}
        self.objects: Dict[str, bytes] = {}
        self.log: List[Dict[str, Any]] = []
        self.faults: Dict[str, Callable[[Any, bytes], bool]] = {}
        handler = type('BoundHandler', (Handler,), dict(hub=self))
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f'http://127.0.0.1:{self.port}'
        self.cdn = f'http://localhost:{self.port}'  # another host, to which the client may not send its token
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        for kept in (self.repos, self.objects, self.faults, self.log):
            kept.clear()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: Dict[str, bytes], **kwargs: Any) -> Repo:
        """A repository with one commit."""
        repo = self.repos[name] = Repo(**kwargs)
        repo.commit(files)
        self.objects.update({oid_of(p, c): c for p, c in files.items() if LFS.search(p)})
        return repo

    def requests(self, method: str, pattern: str) -> List[Dict[str, Any]]:
        """The logged requests of a method with a path that matches."""
        return [r for r in self.log if r['method'] == method and re.search(pattern, r['path'])]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args: Any) -> None:
        pass

    # answers

    def answer(self, status: int, content: bytes = b'', **headers: str) -> None:
        self.send_response(status)
        for name, value in {'Content-Length': str(len(content)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type='application/json')

    def error(self, status: int, message: str, code: Optional[str] = None) -> None:
        headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
        self.answer(status, json.dumps(dict(error=message)).encode(), Content_Type='application/json', **headers)

    def faulty(self, step: str, content: bytes = b'') -> bool:
        fault = self.hub.faults.get(step)
        return fault is not None and fault(self, content)

    def hang_up(self, content: bytes, announced: int) -> bool:
        """Announce a length, send less, and close the connection."""
        self.send_response(200)
        self.send_header('Content-Length', str(announced))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        self.close_connection = True
        return True

    # requests

    @property
    def authorised(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def visible(self, name: str) -> Optional[Repo]:
        """The repository, or an error as the Hub's: without a token it does not say what exists."""
        repo = self.hub.repos.get(name)
        sent = self.headers.get('Authorization')
        if sent and not self.authorised:
            self.error(401, 'Invalid credentials in Authorization header')
        elif repo is not None and (self.authorised or not repo.private):
            return repo
        elif not sent:
            self.error(401, 'Invalid username or password.')
        else:
            self.error(404, 'Repository not found', 'RepoNotFound')
        return None

    def handle_request(self) -> None:
        self.body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(dict(
            method=self.command, path=path, range=self.headers.get('Range'), host=self.headers.get('Host'),
            authorised='Authorization' in self.headers))
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, **match.groupdict())
        return self.error(404, f'no route for {self.command} {path}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.visible(repo)
        if found is None:
            return
        commit = found.main if revision == 'main' else revision
        if commit not in found.commits:
            return self.error(404, 'Revision not found', 'RevisionNotFound')
        content = found.commits[commit].get(path)
        if content is None:
            return self.answer(404, **{'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit})
        oid = oid_of(path, content)
        if not LFS.search(path):
            return self.send_file(content, {'ETag': f'"{oid}"', 'X-Repo-Commit': commit})
        return self.answer(302, Location=f'{self.hub.cdn}/cdn/{oid}', **{
            'X-Repo-Commit': commit, 'X-Linked-Size': str(len(content)), 'X-Linked-ETag': f'"{oid}"'})

    def send_file(self, content: bytes, headers: Dict[str, str]) -> None:
        start = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if not start:
            return self.answer(200, content, **headers)
        first = int(start[1])
        return self.answer(206, content[first:], **headers, **{
            'Content-Range': f'bytes {first}-{len(content) - 1}/{len(content)}'})

    def download(self, oid: str) -> None:
        content = self.hub.objects[oid]
        if not self.faulty('cdn', content):
            self.send_file(content, {'ETag': f'"{oid}"'})

    def info(self, repo: str, revision: str = 'main') -> None:
        found = self.visible(repo)
        if found is None:
            return None
        commit = found.main if revision == 'main' else revision
        siblings = [
            dict(rfilename=p, size=len(c), blobId=oid_of(p, c),
                 **(dict(lfs=dict(sha256=oid_of(p, c), size=len(c), pointerSize=134)) if LFS.search(p) else {}))
            for p, c in found.commits[commit].items()]
        return self.json(dict(
            _id='0' * 24, id=repo, modelId=repo, sha=commit, private=found.private, siblings=siblings, tags=[]))

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f'{wanted["organization"]}/{wanted["name"]}'
        if not self.authorised:
            return self.error(401, 'Invalid username or password.')
        if name in self.hub.repos:
            return self.json(dict(error='You already created this model repo', url=f'{self.hub.endpoint}/{name}'), 409)
        self.hub.add(name, {'.gitattributes': b'*.safetensors filter=lfs\n'})
        return self.json(dict(url=f'{self.hub.endpoint}/{name}', name=name))

    def validate_yaml(self) -> None:
        self.json(dict(errors=[], warnings=[]))

    def preupload(self, repo: str, revision: str) -> None:
        found = self.visible(repo)
        if found is None:
            return
        files = found.files
        self.json(dict(files=[
            dict(path=f['path'], uploadMode='lfs' if LFS.search(f['path']) else 'regular', shouldIgnore=False,
                 oid=oid_of(f['path'], files[f['path']]) if f['path'] in files else None)
            for f in json.loads(self.body)['files']]))

    def lfs_batch(self, repo: str) -> None:
        if not self.authorised:
            return self.error(401, 'Invalid username or password.')
        return self.json(dict(transfer='basic', objects=[
            dict(oid=o['oid'], size=o['size'], **({} if o['oid'] in self.hub.objects else dict(actions=dict(
                upload=dict(href=f'{self.hub.cdn}/lfs/{o["oid"]}'),
                verify=dict(href=f'{self.hub.endpoint}/lfs-verify')))))
            for o in json.loads(self.body)['objects']]))

    def lfs_upload(self, oid: str) -> None:
        if self.faulty('lfs', self.body):
            return None
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, 'The object does not have its hash')
        self.hub.objects[oid] = self.body
        return self.answer(200)

    def lfs_verify(self) -> None:
        self.answer(200 if json.loads(self.body)['oid'] in self.hub.objects else 404)

    def commit(self, repo: str, revision: str) -> None:
        found = self.visible(repo)
        if found is None:
            return None
        if not self.authorised:
            return self.error(401, 'Invalid username or password.')
        if self.faulty('commit'):
            return None
        files = dict(found.files)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header' and value.get('parentCommit', found.main) != found.main:
                return self.error(412, 'A commit has happened since. Please refresh and try again.')
            if item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            if item['key'] == 'lfsFile':
                files[value['path']] = self.hub.objects[value['oid']]
        oid = found.commit(files)
        return self.json(dict(
            success=True, commitOid=oid, commitUrl=f'{self.hub.endpoint}/{repo}/commit/{oid}', hookOutput=''))


ROUTES: Any = [
    (('GET', 'HEAD'), rf'{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', Handler.resolve),
    (('GET', 'HEAD'), r'/cdn/(?P<oid>[0-9a-f]+)', Handler.download),
    (('GET',), rf'/api/models{REPO}(?:/revision/(?P<revision>[^/]+))?', lambda h, repo, revision=None: h.info(
        repo, revision or 'main')),
    (('POST',), '/api/repos/create', Handler.create),
    (('POST',), '/api/validate-yaml', Handler.validate_yaml),
    (('POST',), rf'/api/models{REPO}/preupload/(?P<revision>[^/]+)', Handler.preupload),
    (('POST',), rf'{REPO}\.git/info/lfs/objects/batch', Handler.lfs_batch),
    (('PUT',), r'/lfs/(?P<oid>[0-9a-f]+)', Handler.lfs_upload),
    (('POST',), '/lfs-verify', Handler.lfs_verify),
    (('POST',), rf'/api/models{REPO}/commit/(?P<revision>[^/]+)', Handler.commit),
]
