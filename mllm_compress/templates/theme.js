const root = document.documentElement;
const stored = value => {
  try {
    if (value) localStorage.setItem('theme', value);
    return localStorage.getItem('theme');
  } catch (error) { return null }
};
if (stored()) root.dataset.theme = stored();
addEventListener('DOMContentLoaded', () => {
  const isDark = () => root.dataset.theme === 'dark'
    || !root.dataset.theme && matchMedia('(prefers-color-scheme: dark)').matches;
  const button = document.getElementById('theme'), menu = document.getElementById('menu');
  const label = () => { button.textContent = isDark() ? '☀ light' : '☾ dark' };
  button.hidden = false;
  button.addEventListener('click', () => {
    root.dataset.theme = isDark() ? 'light' : 'dark';
    stored(root.dataset.theme);
    label();
  });
  document.querySelector('.side').addEventListener('click', event => {
    if (event.target.closest('a')) menu.checked = false;
  });
  addEventListener('keydown', event => { if (event.key === 'Escape') menu.checked = false });
  label();
});
