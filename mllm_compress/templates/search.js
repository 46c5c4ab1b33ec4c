// The index is a script, because a page that is opened as a file may not fetch JSON.
const site = document.documentElement.dataset.root;
let index = null;
const loaded = () => index ??= new Promise(resolve => {
  const script = document.createElement('script');
  script.src = site + 'search-index.js';
  script.onload = () => resolve(window.SEARCH);
  document.head.append(script);
});
const BONUS = {name: 12, command: 10, page: 4};

function score([title, kind, , text], words) {
  let sum = 0;
  for (const word of words) {
    const head = title.toLowerCase(), body = text.toLowerCase();
    const own = head === word ? 100 : head.startsWith(word) ? 40 : head.includes(word) ? 20 : 0;
    const inside = body.includes(word) ? 3 : 0;
    if (!own && !inside) return 0;
    sum += own + inside + (own ? BONUS[kind] || 0 : 0);
  }
  return sum;
}

async function find(query, most) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const all = (await loaded()).map(entry => [score(entry, words), entry]);
  const hits = all.filter(([sum]) => sum).sort((a, b) => b[0] - a[0]).slice(0, most);
  return hits.map(([, entry]) => ({entry, words}));
}

function marked(text, words) {
  const part = document.createDocumentFragment(), low = text.toLowerCase();
  let at = 0;
  const starts = words.map(w => [low.indexOf(w), w.length]).filter(([i]) => i >= 0);
  for (const [start, length] of starts.sort((a, b) => a[0] - b[0])) {
    if (start < at) continue;
    const mark = document.createElement('mark');
    mark.textContent = text.slice(start, start + length);
    part.append(text.slice(at, start), mark);
    at = start + length;
  }
  part.append(text.slice(at));
  return part;
}

function shown({entry: [title, kind, url, text], words}) {
  const item = document.createElement('li'), link = document.createElement('a');
  const name = document.createElement('b'), what = document.createElement('span');
  const more = document.createElement('small'), low = text.toLowerCase();
  const first = Math.max(0, Math.min(...words.map(w => low.indexOf(w)).filter(i => i >= 0)) - 60);
  const begin = Number.isFinite(first) && first ? text.indexOf(' ', first) + 1 : 0;
  name.append(marked(title, words));
  what.className = 'kind';
  what.textContent = kind;
  more.append((begin ? '… ' : ''), marked(text.slice(begin, begin + 150), words));
  link.href = site + url;
  link.append(name, what, more);
  item.append(link);
  return item;
}

addEventListener('DOMContentLoaded', () => {
  const box = document.getElementById('q'), list = document.querySelector('.bar .found');
  const fill = async () => {
    const hits = await find(box.value, 12);
    list.replaceChildren(...hits.map(shown));
  };
  box.addEventListener('focus', loaded);
  box.addEventListener('input', fill);
  addEventListener('click', event => { if (!event.target.closest('form')) list.replaceChildren() });
  addEventListener('keydown', event => {
    if (event.key === '/' && !/^(input|textarea)$/i.test(event.target.tagName)) {
      event.preventDefault();
      box.focus();
    }
    if (event.key === 'Escape') list.replaceChildren();
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key], links = [...list.querySelectorAll('a')];
    if (step && links.length && event.target.closest('form')) {
      event.preventDefault();
      const next = links.indexOf(document.activeElement) + step;
      (links[next] || box).focus();
    }
  });
  const all = document.getElementById('all'), query = new URLSearchParams(location.search).get('q');
  if (all && query) {
    box.value = query;
    find(query, 60).then(hits => {
      document.getElementById('count').textContent = `${hits.length} results for “${query}”.`;
      all.replaceChildren(...hits.map(shown));
    });
  }
});
