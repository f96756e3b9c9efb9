"""Search engines for tests, on one port: DuckDuckGo's page without scripts, and SearXNG's JSON.

    python3 search_standin.py PORT

- `POST /html/` answers as DuckDuckGo does: ten results on the first page, an advertisement
  before them, each link behind the engine's own redirect if the query has the word `wrapped`.
- `GET /search?format=json&q=…` answers as SearXNG does.
- `GET /standin/asked` is the list of all queries so far.

Words in the query decide what goes wrong: `captcha`, `limited`, `nothing`.
"""

import html
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, urlsplit

ASKED = []

PAGE = """<!DOCTYPE html>
<html><head><title>{query} at DuckDuckGo</title></head><body class="body--html">
<div id="header" class="header"><form id="search_form_homepage" action="/html/" method="post">
<input name="q" value="{query}"></form></div>
<div class="serp__results"><div id="links" class="results">{results}</div></div></body></html>"""

RESULT = """
<div class="result results_links results_links_deep {kind} ">
 <div class="links_main links_deep result__body">
  <h2 class="result__title"><a rel="nofollow" class="result__a" href="{link}">{title}</a></h2>
  <div class="result__extras"><div class="result__extras__url">
   <a class="result__url" href="{link}"> {shown} </a></div></div>
  <a class="result__snippet" href="{link}">{snippet}</a><div class="clear"></div>
 </div>
</div>"""

NOTHING = """
<div class="result results_links results_links_deep result--no-result">
 <div class="links_main links_deep result__body"><div class="no-results">No  results.</div></div>
</div>"""

CAPTCHA = """<html><body><form id="challenge-form" action="//duckduckgo.com/anomaly.js">
<div class="anomaly-modal__title">Unfortunately, bots use DuckDuckGo too.</div></form></body></html>"""


def hits(query):
    """Returns ten results that name the query."""
    return [
        {
            "title": f"{query}: part {n}",
            "url": f"https://part{n}.example.com/read?q={quote(query)}&n={n}",
            "content": f"Part {n} tells all about {query} & more.",
        }
        for n in range(1, 11)
    ]


def page_of(query):
    if "nothing" in query:
        return PAGE.format(query=html.escape(query), results=NOTHING)
    advertisement = RESULT.format(
        kind="result--ad",
        link="https://duckduckgo.com/y.js?ad_domain=shop.example&amp;ad_provider=x",
        title="Buy now",
        shown="shop.example",
        snippet="An advertisement.",
    )
    results = [advertisement]
    for hit in hits(query):
        link = hit["url"]
        if "wrapped" in query:
            link = f"//duckduckgo.com/l/?uddg={quote(link, safe='')}&rut={'0' * 64}"
        snippet = html.escape(hit["content"]).replace("all", "<b>all</b>")
        results.append(
            RESULT.format(
                kind="web-result",
                link=html.escape(link),
                title=html.escape(hit["title"]),
                shown=html.escape(urlsplit(hit["url"]).netloc),
                snippet=snippet,
            )
        )
    return PAGE.format(query=html.escape(query), results="".join(results))


class Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
        query = form.get("q", [""])[0]
        ASKED.append({"engine": "duckduckgo", "query": query, "headers": dict(self.headers)})
        browser = self.headers.get("user-agent", "").startswith("Mozilla/")
        if urlsplit(self.path).path != "/html/":
            self.answer(404, "text/plain", "nothing here")
        elif not browser or not 0 < len(query) < 500:
            self.answer(403, "text/plain", "")
        elif "captcha" in query:
            self.answer(202, "text/html", CAPTCHA)
        elif "limited" in query:
            self.answer(429, "text/html", "")
        else:
            self.answer(200, "text/html; charset=UTF-8", page_of(query))

    def do_GET(self):
        target = urlsplit(self.path)
        if target.path == "/standin/asked":
            self.answer(200, "application/json", json.dumps(ASKED))
            return
        asked = {key: values[0] for key, values in parse_qs(target.query).items()}
        query = asked.get("q", "")
        ASKED.append({"engine": "searxng", "query": query, "headers": dict(self.headers)})
        if target.path != "/search" or asked.get("format") != "json":
            self.answer(403, "text/html", "Forbidden")
        elif "limited" in query:
            self.answer(429, "text/html", "Too Many Requests")
        else:
            found = [] if "nothing" in query else hits(query)
            more = {"engine": "brave", "engines": ["brave"], "score": 1.0, "category": "general"}
            body = {
                "query": query,
                "number_of_results": 0,
                "results": [hit | more for hit in found],
                "answers": [],
                "corrections": [],
                "infoboxes": [],
                "suggestions": [],
                "unresponsive_engines": [["google", "CAPTCHA"]],
            }
            self.answer(200, "application/json", json.dumps(body))

    def answer(self, status, kind, text):
        body = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Engine).serve_forever()
