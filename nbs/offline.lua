-- After rendering: Quarto loads jQuery and RequireJS from a content network on every page with a table, for widgets.
-- No page has a widget, so both are taken out, and a page loads nothing from anywhere else.
for path in os.getenv('QUARTO_PROJECT_OUTPUT_FILES'):gmatch('[^\n]+') do
  if path:match('%.html$') then
    local file = assert(io.open(path, 'rb'))
    local page = file:read('a')
    file:close()
    local plain = page:gsub('<script src="https://cdn%.jsdelivr%.net/npm/jquery@[^>]*></script>\n?', '')
    plain = plain:gsub('<script src="https://cdn%.jsdelivr%.net/npm/requirejs@[^>]*></script>\n?', '')
    plain = plain:gsub('<script type="application/javascript">define%(\'jquery\'.-</script>\n?', '')
    file = assert(io.open(path, 'wb'))
    file:write(plain)
    file:close()
  end
end
